"""The scheduler against a simulator that spells its promises out, request by request."""

import random
from dataclasses import dataclass

import pytest

from moe_server.messages import Submit
from moe_server.scheduler import Scheduled, Scheduler
from moe_server.sequence import Sequence

PRIORITY_S = 10.0


def make(
    request_id, prompt=4, new_tokens=2, deadline=None, arrived=0.0, priority=0, token=1
) -> Sequence:
    request = Submit(
        request_id, [token] * prompt, new_tokens, [], deadline=deadline, priority=priority
    )
    return Sequence.of(request, arrived)


def make_scheduler(**sizes: int) -> Scheduler:
    return Scheduler(**sizes, reuse_prefixes=False, priority_s=PRIORITY_S)


@dataclass
class SimulatedRequest:
    """What can be said of a request without a scheduler."""

    request_id: int
    prompt: int
    new_tokens: int
    arrived: int
    priority: int
    done: int = 0
    """Tokens run through the model."""
    generated: int = 0
    blocks: int = 0

    @property
    def left(self) -> int:
        return self.prompt + self.generated - self.done

    @property
    def longest(self) -> int:
        """Its last token is never stored."""
        return self.prompt + self.new_tokens - 1


class Simulator:
    """Blocks are counted, not named; who goes first is looked up anew each time."""

    def __init__(self, max_batch_tokens, max_running, num_blocks, block_tokens):
        self.max_batch_tokens, self.block_tokens = max_batch_tokens, block_tokens
        self.tile = 16 if max_batch_tokens >= 32 else 1
        self.most = max(1, min(max_running, max_batch_tokens - self.tile))
        self.free = num_blocks
        self.waiting: list[SimulatedRequest] = []
        self.running: list[SimulatedRequest] = []
        self.num_preempted = self.num_stalled = 0

    def blocks_of(self, tokens: int) -> int:
        blocks = 0
        while blocks * self.block_tokens < tokens:
            blocks += 1
        return blocks

    def sort(self) -> None:
        """By what priority and waiting come to: the same at any time."""
        later = max([0, *(one.arrived for one in (*self.waiting, *self.running))])
        for requests in (self.waiting, self.running):
            requests.sort(key=lambda one: one.request_id)
            requests.sort(
                key=lambda one: one.priority + (later - one.arrived) / PRIORITY_S, reverse=True
            )

    def grow(self) -> None:
        """From the first to the last: who has no block for a token takes the last one's."""
        number = 0
        while number < len(self.running):
            request = self.running[number]
            if self.blocks_of(request.done + 1) <= request.blocks:
                number += 1
            elif self.free > 0:
                self.free -= 1
                request.blocks += 1
            elif number < len(self.running) - 1:
                victim = self.running.pop()
                self.free += victim.blocks
                victim.blocks = victim.done = 0
                self.waiting.append(victim)
                self.num_preempted += 1
            else:
                self.num_stalled += 1
                return

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.most:
            # Nobody starts who would get no token in this step.
            if self.max_batch_tokens - sum(one.left for one in self.running) < self.tile:
                return
            first = self.waiting[0]
            needed = self.blocks_of(first.prompt + first.generated)
            spare = len([one for one in self.running if one.blocks < self.blocks_of(one.longest)])
            if needed + spare > self.free:
                return
            first.blocks = needed
            self.free -= needed
            self.running.append(self.waiting.pop(0))
            self.sort()

    def plan(self) -> list[tuple[int, int]]:
        """(request, tokens) of the next step: decodes first, then prompts, both first come."""
        self.sort()
        self.grow()
        self.sort()
        self.admit()
        decodes = [
            (one.request_id, 1)
            for one in self.running
            if one.left == 1 and one.blocks * self.block_tokens > one.done
        ]
        room, prefills = self.max_batch_tokens - len(decodes), []
        for request in self.running:
            if request.left > 1:
                tokens = min(request.left, room)
                # A prompt is cut between tiles; behind it, anywhere.
                while (
                    request.done + tokens < request.prompt and (request.done + tokens) % self.tile
                ):
                    tokens -= 1
                if tokens > 0:
                    prefills.append((request.request_id, tokens))
                    room -= tokens
        return decodes + prefills

    def remove(self, request_id: int) -> None:
        for requests in (self.waiting, self.running):
            for request in list(requests):
                if request.request_id == request_id:
                    self.free += request.blocks
                    requests.remove(request)


@pytest.mark.parametrize("seed", range(120))
def test_scheduler_equals_the_simulator(seed):
    choose = random.Random(seed)
    block_tokens, num_blocks = choose.choice([1, 3, 16]), choose.randint(4, 30)
    sizes = {
        "max_batch_tokens": choose.choice([1, 2, 7, 33, 64]),
        "max_running": choose.choice([1, 3, 32]),
        "num_blocks": num_blocks,
        "block_tokens": block_tokens,
    }
    scheduler, simulator = make_scheduler(**sizes), Simulator(**sizes)
    to_come, arrivals, ended = choose.randint(5, 25), {}, []
    highest = choose.choice([0, 3])
    for now in range(6000):
        while to_come and choose.random() < 0.4:
            longest = num_blocks * block_tokens + 1
            # A whole pool's request now and then: its last token is never stored.
            tokens = choose.choice([longest, choose.randint(2, longest)])
            new_tokens = choose.randint(1, tokens - 1)
            request_id = len(arrivals)
            priority = choose.randint(-highest, highest)
            facts = (request_id, tokens - new_tokens, new_tokens)
            arrivals[request_id] = SimulatedRequest(*facts, now, priority)
            scheduler.add(make(*facts, arrived=float(now), priority=priority))
            simulator.waiting.append(arrivals[request_id])
            to_come -= 1
        expected = simulator.plan()
        step = scheduler.schedule(float(now))
        scheduler.check_integrity()
        assert [(one.sequence.request.request_id, one.num_tokens) for one in step] == expected
        assert sum(one.num_tokens for one in step) <= sizes["max_batch_tokens"]
        assert scheduler.blocks.num_free == simulator.free
        for one in step:
            stored = len(one.sequence.block_table) * block_tokens
            assert stored >= one.sequence.num_computed + one.num_tokens, "too few blocks"
        if not expected and not to_come:
            break
        completing = [one.sequence for one in step if one.completes_input]
        scheduler.advance(step)
        for request_id, tokens in expected:
            arrivals[request_id].done += tokens
        assert [one.request.request_id for one in completing] == [
            request_id for request_id, _ in expected if arrivals[request_id].left == 0
        ]
        for sequence in completing:
            request = arrivals[sequence.request.request_id]
            sequence.token_ids.append(1)
            request.generated += 1
            if request.generated == request.new_tokens:
                assert scheduler.remove(request.request_id)
                simulator.remove(request.request_id)
                ended.append(request.request_id)
        if choose.random() < 0.1:
            request_id = choose.choice([*arrivals, 999])
            here = request_id in arrivals and request_id not in ended
            assert scheduler.remove(request_id) == here
            simulator.remove(request_id)
            ended.extend([request_id] * here)
        scheduler.check_integrity()
    else:
        pytest.fail("requests never end")
    assert sorted(ended) == sorted(arrivals)
    assert scheduler.blocks.num_free == num_blocks
    assert scheduler.counters.preemptions == simulator.num_preempted


def test_a_small_request_does_not_overtake_one_that_waits_for_blocks():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=8, num_blocks=4, block_tokens=4)
    for request_id, prompt in enumerate([8, 12, 1]):
        scheduler.add(make(request_id, prompt, new_tokens=1))
    scheduler.schedule(now=0.0)
    assert [sequence.request.request_id for sequence in scheduler.running] == [0]
    scheduler.remove(1)
    scheduler.schedule(now=0.0)
    assert [sequence.request.request_id for sequence in scheduler.running] == [0, 2]


def order(scheduler: Scheduler) -> list[int]:
    return [sequence.request.request_id for sequence in scheduler.waiting]


def test_a_level_of_priority_counts_like_seconds_of_waiting():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=1, num_blocks=9, block_tokens=4)
    arrivals = [(0.0, 0), (5.0, 1), (11.0, 1), (12.0, -1), (20.5, 2), (21.5, 0), (99.0, 10)]
    for request_id, (arrived, priority) in enumerate(arrivals):
        scheduler.add(make(request_id, arrived=arrived, priority=priority))
    assert order(scheduler) == [1, 6, 0, 4, 2, 5, 3]


def test_nobody_starves_behind_a_stream_of_the_highest_priority():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=1, num_blocks=9, block_tokens=4)
    scheduler.add(make(0, new_tokens=1, priority=-10))
    now, started = 0.0, None
    for request_id in range(1, 1000):
        scheduler.add(make(request_id, new_tokens=1, arrived=now, priority=10))
        [one] = scheduler.schedule(now)
        now += 1.0
        if one.sequence.request.request_id == 0:
            started = now
            break
        scheduler.advance([one])
        scheduler.remove(one.sequence.request.request_id)
    assert started == pytest.approx(20 * PRIORITY_S, abs=2)


def test_the_highest_priority_s_prompt_goes_first_and_the_lowest_gives_its_blocks():
    scheduler = make_scheduler(max_batch_tokens=32, max_running=8, num_blocks=16, block_tokens=4)
    for request_id, priority in enumerate([-1, 0, 1]):
        scheduler.add(make(request_id, 16, new_tokens=40, priority=priority))
    first = scheduler.schedule(now=0.0)
    assert [one.sequence.request.request_id for one in first] == [2, 1]
    scheduler.remove(1)
    drive(scheduler, 30)
    assert order(scheduler) == [0]
    assert scheduler.counters.preemptions == 1


def test_decodes_go_on_while_a_long_prompt_is_prefilled():
    scheduler = make_scheduler(max_batch_tokens=5, max_running=8, num_blocks=100, block_tokens=4)
    for request_id in (0, 1):
        scheduler.add(make(request_id, 1, new_tokens=50))
    scheduler.add(make(2, 31, new_tokens=1))
    for _ in range(10):
        step = scheduler.schedule(now=0.0)
        parts = {one.sequence.request.request_id: one.num_tokens for one in step}
        assert parts == {0: 1, 1: 1, 2: 3}
        decoding = [one.sequence for one in step if one.completes_input]
        scheduler.advance(step)
        for sequence in decoding:
            sequence.token_ids.append(1)


def test_expired_finds_waiting_and_running_requests_whose_time_has_come():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=2, num_blocks=100, block_tokens=4)
    for request_id, deadline in enumerate([10.0, None, 20.0, 10.0, None]):
        scheduler.add(make(request_id, deadline=deadline))
    scheduler.schedule(now=0.0)
    assert len(scheduler.running) == 2

    def expired(now: float) -> list[int]:
        return sorted(sequence.request.request_id for sequence in scheduler.expired(now))

    assert expired(9.99) == []
    assert expired(10.0) == [0, 3]
    assert expired(30.0) == [0, 2, 3]


def test_a_request_larger_than_the_pool_is_a_programmer_error():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=2, num_blocks=2, block_tokens=4)
    scheduler.add(make(0, 8, new_tokens=1))
    with pytest.raises(AssertionError):
        scheduler.add(make(1, 8, new_tokens=2))


def drive(scheduler: Scheduler, num_steps: int) -> list[dict[int, int]]:
    """Runs steps in which no request ends; the tokens of each request in each."""
    steps = []
    for _ in range(num_steps):
        step = scheduler.schedule(now=0.0)
        steps.append({one.sequence.request.request_id: one.num_tokens for one in step})
        completing = [one.sequence for one in step if one.completes_input]
        scheduler.advance(step)
        for sequence in completing:
            sequence.token_ids.append(1)
        scheduler.check_integrity()
    return steps


def test_the_first_takes_the_last_one_s_blocks_and_that_is_computed_again():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=8, num_blocks=4, block_tokens=4)
    scheduler.add(make(0, 4, new_tokens=13))
    scheduler.add(make(1, 4, new_tokens=9))
    # Each starts with one block and keeps one in reserve; in the end the first needs all four.
    assert drive(scheduler, 9) == [{0: 4, 1: 4}] + [{0: 1, 1: 1}] * 4 + [{0: 1}] * 4
    [preempted] = scheduler.waiting
    assert preempted.num_computed == 0
    assert preempted.num_completion_tokens == 5
    assert scheduler.counters.preemptions == 1
    assert scheduler.remove(0)
    assert drive(scheduler, 2) == [{1: 9}, {1: 1}]


def test_the_last_one_waits_for_a_block_and_keeps_its_own():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=8, num_blocks=3, block_tokens=4)
    scheduler.add(make(0, 4, new_tokens=8))
    scheduler.add(make(1, 4, new_tokens=8))
    [first, *others] = drive(scheduler, 4)
    assert first == {0: 4, 1: 4}
    assert others == [{0: 1}] * 3
    assert len(scheduler.running) == 2
    scheduler.remove(0)
    assert drive(scheduler, 1) == [{1: 1}]


# Prefixes


class Memory:
    """What is stored where: of each place, the tokens up to and including its own."""

    def __init__(self, scheduler: Scheduler, num_blocks: int, block_tokens: int) -> None:
        self.scheduler, self.block_tokens = scheduler, block_tokens
        self.places: list[list[tuple[int, ...]]] = [[()] * block_tokens for _ in range(num_blocks)]

    def run(self, step: list[Scheduled]) -> None:
        """Every token finds all those before it, and nobody writes where another one reads."""
        for one in step:
            sequence, ids = one.sequence, one.sequence.token_ids
            for position in range(sequence.num_computed + one.num_tokens):
                block = sequence.block_table[position // self.block_tokens]
                place, tokens = position % self.block_tokens, tuple(ids[: position + 1])
                if position < sequence.num_computed:
                    assert self.places[block][place] == tokens
                else:
                    others = [table for table in self.tables() if block in table]
                    assert len(others) == 1, "written while shared"
                    self.places[block][place] = tokens

    def tables(self) -> list[list[int]]:
        return [sequence.block_table for sequence in self.scheduler.running]


@pytest.mark.parametrize("seed", range(60))
def test_shared_blocks_hold_what_their_requests_would_have_computed(seed):
    choose = random.Random(seed)
    block_tokens, num_blocks = choose.choice([1, 3, 16]), choose.randint(8, 40)
    scheduler = Scheduler(
        max_batch_tokens=choose.choice([1, 7, 33, 64]),
        max_running=choose.choice([1, 3, 32]),
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        reuse_prefixes=True,
        priority_s=PRIORITY_S,
    )
    memory = Memory(scheduler, num_blocks, block_tokens)
    longest = num_blocks * block_tokens
    stems = [[choose.randrange(3) for _ in range(longest)] for _ in range(2)]
    to_come, submitted, left = 25, 0, {}
    while to_come or scheduler.waiting or scheduler.running:
        while to_come and choose.random() < 0.3:
            prompt = choose.choice(stems)[: choose.randint(1, longest - 1)]
            if choose.random() < 0.3:
                prompt = [*prompt[:-1], 3]
            new_tokens = choose.randint(1, min(20, longest - len(prompt)))
            request = Submit(submitted, prompt, new_tokens, [])
            scheduler.add(Sequence.of(request, float(submitted)))
            submitted += 1
            to_come -= 1
        step = scheduler.schedule(now=0.0)
        scheduler.check_integrity()
        memory.run(step)
        # A request that leaves during the step has stored rubbish.
        for one in step:
            if choose.random() < 0.02:
                for position in range(one.sequence.num_computed, len(one.sequence.token_ids)):
                    block = one.sequence.block_table[position // block_tokens]
                    memory.places[block][position % block_tokens] = (-1,)
                assert scheduler.remove(one.sequence.request.request_id)
                left[one.sequence.request.request_id] = one.sequence
        completing = [one.sequence for one in step if one.completes_input]
        scheduler.advance(step)
        for sequence in completing:
            sequence.token_ids.append(choose.randrange(3))
            if len(sequence.token_ids) == sequence.max_tokens:
                scheduler.remove(sequence.request.request_id)
                left[sequence.request.request_id] = sequence
        scheduler.check_integrity()
    assert len(left) == 25
    assert scheduler.blocks.num_free == num_blocks
    assert scheduler.counters.cached_tokens == sum(one.cached_tokens or 0 for one in left.values())


def reusing(**sizes: int) -> Scheduler:
    defaults = {"max_batch_tokens": 64, "max_running": 8, "num_blocks": 100, "block_tokens": 16}
    return Scheduler(**(defaults | sizes), reuse_prefixes=True, priority_s=PRIORITY_S)


def finish(scheduler: Scheduler) -> None:
    """Lets all requests end after their first token."""
    while step := scheduler.schedule(now=0.0):
        completing = [one.sequence for one in step if one.completes_input]
        scheduler.advance(step)
        for sequence in completing:
            scheduler.remove(sequence.request.request_id)


@pytest.mark.parametrize(
    ("block_tokens", "prompt", "cached"),
    [
        (16, 64, 48),
        (16, 65, 64),
        (16, 70, 64),
        (3, 100, 96),
        (3, 95, 48),
        (64, 129, 128),
        (1, 33, 32),
    ],
)
def test_a_prompt_seen_before_is_computed_from_its_last_whole_tile_on(block_tokens, prompt, cached):
    scheduler = reusing(block_tokens=block_tokens, max_batch_tokens=512)
    for request_id in (0, 1):
        scheduler.add(make(request_id, prompt, new_tokens=1))
        if not request_id:
            finish(scheduler)
    [one] = scheduler.schedule(now=0.0)
    assert one.sequence.cached_tokens == cached
    assert one.num_tokens == prompt - cached
    assert (scheduler.counters.prompt_tokens, scheduler.counters.cached_tokens) == (
        2 * prompt,
        cached,
    )


def test_what_is_being_computed_is_waited_for_and_others_go_first():
    scheduler = reusing(max_batch_tokens=160)
    scheduler.add(make(0, 128, new_tokens=9))
    scheduler.add(make(1, 128, new_tokens=9))
    scheduler.add(make(2, 20, new_tokens=9, arrived=1.0, token=7))
    assert drive(scheduler, 1) == [{0: 128, 2: 20}]
    # All is there but the last tile.
    assert drive(scheduler, 1) == [{0: 1, 1: 16, 2: 1}]


def test_who_would_get_no_token_of_the_step_waits_and_is_passed_by_who_comes_before():
    scheduler = make_scheduler(max_batch_tokens=64, max_running=8, num_blocks=99, block_tokens=4)
    scheduler.add(make(0, 128, new_tokens=9))
    scheduler.add(make(1, 64, new_tokens=9))
    assert drive(scheduler, 1) == [{0: 64}]
    scheduler.add(make(2, 32, new_tokens=9, priority=1))
    assert drive(scheduler, 3) == [{0: 64}, {0: 1, 2: 32, 1: 16}, {0: 1, 2: 1, 1: 48}]


def test_what_a_request_stored_that_left_during_the_step_is_not_reused():
    scheduler = reusing()
    scheduler.add(make(0, 60))
    step = scheduler.schedule(now=0.0)
    scheduler.remove(0)
    scheduler.advance(step)
    assert scheduler.blocks.num_kept == 0


def test_a_preempted_request_finds_its_prompt_again():
    scheduler = reusing(num_blocks=6)
    scheduler.add(make(0, 16, new_tokens=60))
    scheduler.add(make(1, 40, new_tokens=30, token=5))
    drive(scheduler, 42)
    [preempted] = scheduler.waiting
    assert preempted.cached_tokens == 0
    scheduler.remove(0)
    [one] = scheduler.schedule(now=0.0)
    assert one.sequence is preempted
    assert one.sequence.num_computed == 32
    assert preempted.cached_tokens == 0, "of its first start"
