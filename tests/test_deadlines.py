"""Refusing what cannot be done in time, held to what would have come of it."""

import random
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from moe_server.deadlines import Hopeless, hopeless
from moe_server.errors import Reason
from moe_server.messages import Submit
from moe_server.scheduler import Scheduler
from moe_server.sequence import Sequence
from moe_server.step_costs import StepCosts


def known(seconds_of: dict[int, float]) -> StepCosts:
    costs = StepCosts()
    for _ in range(8):
        for num_tokens, seconds in seconds_of.items():
            costs.observe(num_tokens, seconds)
    return costs


def test_nothing_is_said_before_enough_steps_were_seen():
    costs = StepCosts()
    for _ in range(7):
        costs.observe(1, 1.0)
        assert costs.least_s(1) == costs.least_prefill_s(1000, 10) == 0.0
    costs.observe(1, 1.0)
    assert costs.least_s(1) == 1.0


@pytest.mark.parametrize(
    ("num_tokens", "least"),
    # 511 tokens are more than any of up to 256, but may be fewer than any of up to 512.
    [(1, 1.0), (2, 2.0), (100, 2.0), (255, 2.0), (256, 5.0), (511, 5.0), (512, 8.0), (9999, 8.0)],
)
def test_a_step_takes_what_the_fastest_that_is_not_larger_took(num_tokens, least):
    assert known({1: 1.0, 2: 2.0, 200: 5.0, 512: 8.0}).least_s(num_tokens) == least


def test_nothing_is_known_of_steps_smaller_than_all_that_were_seen():
    assert known({5: 1.0}).least_s(4) == known({5: 1.0}).least_s(7) == 0.0
    assert known({5: 1.0}).least_s(8) == 1.0


def test_a_larger_step_that_took_less_shows_what_smaller_ones_can_take():
    assert known({1: 3.0, 8: 1.5}).least_s(1) == 1.5


@pytest.mark.parametrize("seed", range(20))
def test_what_was_said_before_does_not_outlive_a_faster_step(seed):
    choose = random.Random(seed)
    asked, fresh_costs = StepCosts(), StepCosts()
    for _ in range(60):
        num_tokens, seconds = choose.randint(1, 512), choose.random()
        asked.observe(num_tokens, seconds)
        fresh_costs.observe(num_tokens, seconds)
        of = choose.randint(1, 1024)
        assert asked.least_s(of) == deepcopy(fresh_costs).least_s(of)


@pytest.mark.parametrize("seed", range(200))
def test_bounds_never_exceed_a_cost_that_grows_with_the_tokens(seed):
    choose = random.Random(seed)
    fixed, each = choose.random(), choose.random() / 100
    costs = StepCosts()
    for _ in range(choose.randint(8, 40)):
        num_tokens = choose.choice([1, choose.randint(1, 512)])
        costs.observe(num_tokens, fixed + each * num_tokens)
    for num_tokens in range(1, 600):
        assert costs.least_s(num_tokens) <= fixed + each * num_tokens


# Against the scheduler itself


@dataclass
class World:
    """The real scheduler, with time that passes as the steps cost."""

    choose: random.Random
    fixed: float
    each: float
    scheduler: Scheduler
    costs: StepCosts = field(default_factory=StepCosts)
    now: float = 0.0
    finished: dict[int, float] = field(default_factory=dict)
    ends_early: bool = False

    def step(self, slowest: float = 1.0) -> None:
        for sequence in self.scheduler.expired(self.now):
            self.scheduler.remove(sequence.request.request_id)
        step = self.scheduler.schedule(self.now)
        if not step:
            return
        num_tokens = sum(one.num_tokens for one in step)
        seconds = (self.fixed + self.each * num_tokens) * self.choose.uniform(1.0, slowest)
        self.now += seconds
        self.costs.observe(num_tokens, seconds)
        completing = [one.sequence for one in step if one.completes_input]
        self.scheduler.advance(step)
        for sequence in completing:
            sequence.token_ids.append(0)
            request, count = sequence.request, sequence.num_completion_tokens
            fewest = request.fewest_new_tokens if self.ends_early else request.max_new_tokens
            if count >= fewest:
                self.scheduler.remove(request.request_id)
                self.finished[request.request_id] = self.now

    def would_finish_at(self, request_id: int) -> float:
        """What comes of a request where all goes well, nobody comes after it or is given up."""
        other = deepcopy(self)
        other.ends_early = True
        for sequence in (*other.scheduler.waiting, *other.scheduler.running):
            sequence.request = structs.replace(sequence.request, deadline=None)
        while request_id not in other.finished:
            other.step()
        return other.finished[request_id]


def world(choose: random.Random) -> World:
    scheduler = Scheduler(
        max_batch_tokens=choose.choice([24, 64, 256]),
        max_running=choose.choice([2, 32]),
        num_blocks=choose.choice([64, 400]),
        block_tokens=16,
        reuse_prefixes=True,
        priority_s=1.0,
    )
    world = World(choose, choose.choice([0.01, 0.1]), choose.choice([0.0, 0.0005]), scheduler)
    # As the warm-up does: before anything else, all sizes of steps were seen.
    for number in range(-6, 0):
        prompt = [-number] * min(800, scheduler.max_batch_tokens)
        scheduler.add(Sequence.of(Submit(number, prompt, 4, []), world.now))
        while scheduler.running or scheduler.waiting:
            world.step()
    return world


@pytest.mark.parametrize("seed", range(60))
def test_what_is_refused_would_have_been_late(seed):
    choose = random.Random(seed)
    this = world(choose)
    stems = [choose.choices(range(9), k=900) for _ in range(2)]
    refused = 0
    for number in range(60):
        length = choose.randint(1, 900)
        common = choose.choice([0, choose.randint(0, length)])
        prompt = choose.choice(stems)[:common] + choose.choices(range(9), k=length - common)
        new_tokens = choose.randint(1, 60)
        this.scheduler.add(
            Sequence.of(
                Submit(
                    number,
                    prompt,
                    new_tokens,
                    [],
                    deadline=this.now + choose.choice([1e9, choose.uniform(0.01, 4.0)]),
                    priority=choose.randint(-3, 3),
                    fewest_new_tokens=choose.choice([1, new_tokens]),
                ),
                this.now,
            )
        )
        for verdict in list(hopeless(this.scheduler, this.costs, this.now)):
            request = verdict.sequence.request
            assert this.would_finish_at(request.request_id) > request.deadline
            this.scheduler.remove(request.request_id)
            refused += 1
        for _ in range(choose.choice([0, 1, 5])):
            this.step(slowest=choose.choice([1.0, 3.0]))
    if this.fixed == 0.1:
        assert refused > 3


# What is said


def alone(prompt: int, new_tokens: int, deadline: float, scheduler: Scheduler) -> list[Hopeless]:
    request = Submit(
        9, [7] * prompt, new_tokens, [], deadline=deadline, fewest_new_tokens=new_tokens
    )
    scheduler.add(Sequence.of(request, 100.0))
    costs = known({1: 0.1, 64: 0.5})
    return list(hopeless(scheduler, costs, 100.0))


def make_scheduler() -> Scheduler:
    return Scheduler(
        max_batch_tokens=64,
        max_running=4,
        num_blocks=100,
        block_tokens=16,
        reuse_prefixes=True,
        priority_s=1.0,
    )


def test_what_takes_too_long_alone_is_told_how_much_fits():
    assert alone(128, 41, 105.01, make_scheduler()) == []
    [verdict] = alone(128, 41, 104.99, make_scheduler())
    error = verdict.error()
    assert error.reason is Reason.EXPIRED
    assert "128 tokens and 41 new ones take at least 5.00 s" in error.message
    assert "4.99 s are left" in error.message
    assert error.remedy == "Give it more than 5.00 s, or ask for at most 40 new tokens."
    [verdict] = alone(128, 41, 100.9, make_scheduler())
    assert verdict.error().remedy == "Give it more than 5.00 s, or send a shorter prompt."


def test_what_is_only_late_because_of_others_can_be_tried_again():
    scheduler = make_scheduler()
    scheduler.add(Sequence.of(Submit(1, [5] * 640, 1, []), 99.0))
    [verdict] = alone(128, 1, 105.9, scheduler)
    error = verdict.error()
    assert error.reason is Reason.EXHAUSTED
    assert "prompts that came before take at least 5.00 s" in error.message
    assert "Give it more than 6.00 s" in error.remedy
    assert "Try again later" in error.remedy


def test_a_prompt_that_is_there_already_takes_no_time():
    scheduler = make_scheduler()
    scheduler.add(Sequence.of(Submit(1, [7] * 640, 1, []), 99.0))
    # The first computes what the second needs; it waits for that, which costs nothing of its own.
    assert alone(640, 1, 100.51, scheduler) == []
    assert [one.sequence.request.request_id for one in alone(640, 1, 100.49, make_scheduler())] == [
        9
    ]
