"""Who is refused for the wait: held to promises in random schedules, and to real waits."""

import math
import random
from copy import deepcopy
from itertools import count

import pytest

from moe_server.backlog import ENOUGH_S, LONGEST_RETRY_S, MEMORY_S, PATIENCE_STEPS, Backlog
from moe_server.errors import Reason
from moe_server.messages import Submit
from moe_server.scheduler import Scheduler
from moe_server.sequence import Sequence

MAX_WAIT_S = 3.0
STEP_S = 0.1


def make_scheduler(max_running: int = 4, num_blocks: int = 60) -> Scheduler:
    return Scheduler(
        max_batch_tokens=64,
        max_running=max_running,
        num_blocks=num_blocks,
        block_tokens=16,
        reuse_prefixes=False,
        priority_s=1.0,
    )


class Twin:
    """The pace from everything that ever happened, weighed anew each time."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int]] = []

    def seconds_of(self, num_tokens: int, now: float) -> float:
        weights = [math.exp(-(now - ended) / MEMORY_S) for ended, _, _ in self.seen]
        seconds = sum(w * took for w, (_, took, _) in zip(weights, self.seen, strict=True))
        tokens = sum(w * started for w, (_, _, started) in zip(weights, self.seen, strict=True))
        return num_tokens * seconds / tokens if seconds >= ENOUGH_S and tokens else 0.0


@pytest.mark.parametrize("seed", range(40))
def test_nobody_waits_for_too_long_and_who_comes_later_counts_nothing(seed):
    choose = random.Random(seed)
    scheduler, backlog = make_scheduler(choose.choice([1, 4, 16])), Backlog(MAX_WAIT_S)
    twin = Twin()
    numbers = count()
    now, refused, step_s, waited = 0.0, 0, 0.0, False
    for _ in range(400):
        for _ in range(choose.choice([0, 0, 1, 1, 2])):
            new_tokens = choose.randint(1, 30)
            request = Submit(
                next(numbers),
                [1] * choose.randint(1, 300),
                new_tokens,
                [],
                deadline=now + choose.choice([1e9, choose.uniform(0.1, 9.0)]),
                priority=choose.randint(-2, 2),
                is_patient=choose.random() < 0.1,
            )
            scheduler.add(Sequence.of(request, now))
        started = scheduler.counters.started_tokens
        planned_at = now
        planned = scheduler.schedule(now)
        backlog.observe(scheduler, now)
        if waited:
            twin.seen.append((now, step_s, scheduler.counters.started_tokens - started))
        probe = choose.randint(1, 5000)
        assert backlog.seconds_of(probe) == pytest.approx(twin.seconds_of(probe, now))

        patience_s = max(MAX_WAIT_S, PATIENCE_STEPS * step_s if waited else 0.0)
        verdicts = list(backlog.refused(scheduler, now))
        for verdict in verdicts:
            sequence, request = verdict.sequence, verdict.sequence.request
            assert sequence.cached_tokens is None
            assert not request.is_patient
            assert verdict.limit_s <= request.deadline - sequence.arrived
            # Whoever is behind it can be taken away: it would be refused all the same.
            before = deepcopy(scheduler)
            rank = scheduler.rank(sequence)
            before.waiting = [one for one in before.waiting if scheduler.rank(one) <= rank]
            assert any(
                one.sequence.request.request_id == request.request_id
                for one in backlog.refused(before, now)
            )
            assert 0 < verdict.error().retry_s <= LONGEST_RETRY_S
        for verdict in verdicts:
            scheduler.remove(verdict.sequence.request.request_id)
        refused += len(verdicts)
        for sequence in scheduler.waiting:
            if sequence.cached_tokens is None and not sequence.request.is_patient:
                assert now - sequence.arrived < patience_s

        waited = bool(scheduler.waiting) or bool(verdicts)
        completing = [one.sequence for one in planned if one.completes_input]
        scheduler.advance(planned)
        for sequence in completing:
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == sequence.max_tokens:
                scheduler.remove(sequence.request.request_id)
        now += STEP_S * choose.choice([1, 1, 1, 5])
        step_s = now - planned_at
    assert refused > 20


def fill(scheduler: Scheduler, count_: int, arrived: float, first_id: int = 0, **facts) -> None:
    """Queues requests of 64 tokens that want one new token: each takes a step of its own."""
    for request_id in range(first_id, first_id + count_):
        scheduler.add(Sequence.of(Submit(request_id, [1] * 64, 1, [], **facts), arrived))


def run(scheduler: Scheduler, backlog: Backlog, now: float, num_steps: int) -> float:
    for _ in range(num_steps):
        [one] = scheduler.schedule(now)
        backlog.observe(scheduler, now)
        scheduler.advance([one])
        scheduler.remove(one.sequence.request.request_id)
        now += STEP_S
    return now


def refused_ids(scheduler: Scheduler, backlog: Backlog, now: float) -> list[int]:
    return [one.sequence.request.request_id for one in backlog.refused(scheduler, now)]


def test_what_is_foreseen_is_what_comes():
    scheduler, backlog = make_scheduler(), Backlog(MAX_WAIT_S)
    fill(scheduler, 100, 0.0)
    # Nobody knows the pace: all of them could start in time.
    assert refused_ids(scheduler, backlog, 0.0) == []
    now = run(scheduler, backlog, 0.0, 22)
    assert backlog.seconds_of(64 * 20) == pytest.approx(20 * STEP_S)
    # One starts every 0.1 s; number 30 would start after 2.98 s.
    now -= 0.02
    assert refused_ids(scheduler, backlog, now) == list(range(31, 100))
    [first, *_] = backlog.refused(scheduler, now)
    error = first.error()
    assert error.reason is Reason.EXHAUSTED
    assert "waited for 2.2 s" in error.message
    assert "keep it for 0.9 s more" in error.message
    assert "it may wait for 3.0 s" in error.message
    assert "scheduler.max_wait_s" in error.remedy
    assert error.retry_s == pytest.approx(78 * STEP_S)


def test_who_comes_is_refused_at_once_and_a_higher_priority_is_not():
    scheduler, backlog = make_scheduler(), Backlog(MAX_WAIT_S)
    fill(scheduler, 60, 0.0, is_patient=True)
    now = run(scheduler, backlog, 0.0, 22)
    fill(scheduler, 1, now, first_id=100)
    # Worth three seconds: nobody is in front.
    fill(scheduler, 1, now, first_id=101, priority=3)
    # It has less time than the others.
    fill(scheduler, 1, now, first_id=102, priority=1, deadline=now + 0.1)
    assert refused_ids(scheduler, backlog, now) == [102, 100]


def test_nothing_is_foreseen_long_after_the_last_one_waited():
    scheduler, backlog = make_scheduler(), Backlog(MAX_WAIT_S)
    fill(scheduler, 60, 0.0, is_patient=True)
    now = run(scheduler, backlog, 0.0, 60)
    backlog.observe(scheduler, now + 10 * MEMORY_S)
    assert backlog.seconds_of(64) == 0.0


def test_where_a_step_takes_seconds_the_bound_grows():
    scheduler, backlog = make_scheduler(max_running=1), Backlog(MAX_WAIT_S)
    fill(scheduler, 3, 0.0)
    for now, refused in ((0.0, []), (7.0, []), (14.0, [1, 2])):
        scheduler.schedule(now)
        backlog.observe(scheduler, now)
        assert refused_ids(scheduler, backlog, now) == refused


def test_0_bounds_nothing_but_what_the_deadline_does():
    scheduler, backlog = make_scheduler(), Backlog(0.0)
    fill(scheduler, 60, 0.0)
    fill(scheduler, 1, 0.0, first_id=100, deadline=4.0)
    now = run(scheduler, backlog, 0.0, 22)
    assert refused_ids(scheduler, backlog, now) == [100]
