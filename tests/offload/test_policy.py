"""The policies against brute-force twins that remember everything and care nothing for speed."""

import itertools
import random
from dataclasses import dataclass, field

import pytest

from moe_server.offload.layout import ExpertId
from moe_server.offload.policy import LFU_HALF_LIFE_USES, POLICIES, make_policy
from moe_server.offload.policy_next_visit import (
    HALF_LIFE_VISITS,
    MEMORY_VISITS,
    PASS_ON_BELOW,
)


@dataclass
class Twin:
    """What every twin knows: who is held, and all uses there ever were, in order."""

    capacity: int
    num_layers: int
    held: set[ExpertId] = field(default_factory=set)
    placed: dict[ExpertId, int] = field(default_factory=dict)
    """When each was used, or added, last."""
    uses: list[ExpertId] = field(default_factory=list)
    clock: itertools.count = field(default_factory=itertools.count)

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        self.held.add(expert)
        self.placed[expert] = next(self.clock)
        if used:
            self.uses.append(expert)

    def remove(self, expert: ExpertId) -> None:
        self.held.remove(expert)

    def touch(self, expert: ExpertId) -> None:
        self.placed[expert] = next(self.clock)
        self.uses.append(expert)

    def of(self, layer: int, keep: set[ExpertId] = frozenset()) -> list[ExpertId]:
        """The layer's experts outside `keep`, least recently used first."""
        mine = [one for one in self.held if one.layer == layer and one not in keep]
        return sorted(mine, key=self.placed.__getitem__)

    def excess(self, layer: int) -> int:
        share = len([slot for slot in range(self.capacity) if slot % self.num_layers == layer])
        return len(self.of(layer)) - share

    def givers(self, layer: int) -> list[int]:
        backwards = [(layer - back) % self.num_layers for back in range(1, self.num_layers)]
        over = [other for other in backwards if self.excess(other) > 0]
        own = [layer]
        first = own if self.excess(layer) >= 0 else []
        return first + over + own + backwards

    def worst(self, layer: int, keep: set[ExpertId]) -> ExpertId | None:
        return min(self.of(layer, keep), key=self.worth, default=None)

    def worth(self, expert: ExpertId) -> float:
        return self.placed[expert]

    def victim(self, incoming: ExpertId, keep: set[ExpertId]) -> ExpertId | None:
        worst = [self.worst(layer, keep) for layer in self.givers(incoming.layer)]
        return next((one for one in worst if one), None)


class GlobalLruTwin(Twin):
    def victim(self, incoming: ExpertId, keep: set[ExpertId]) -> ExpertId | None:
        return min(self.held - keep, key=self.worth, default=None)


class LfuTwin(Twin):
    def worth(self, expert: ExpertId) -> float:
        mine = [one for one in self.uses if one.layer == expert.layer]
        ages = [age for age, one in enumerate(reversed(mine)) if one == expert]
        return sum(0.5 ** (age / LFU_HALF_LIFE_USES) for age in ages)


class NextVisitTwin(Twin):
    def visits(self, layer: int) -> list[set[ExpertId]]:
        """The layer's visits, told from the order of all uses."""
        visits, last = [], None
        for one in self.uses:
            if one.layer == layer:
                if last != layer or one in visits[-1]:
                    visits.append(set())
                visits[-1].add(one)
            last = one.layer
        return visits

    @staticmethod
    def popularity(expert: ExpertId, visits: list[set[ExpertId]]) -> float:
        decay = 0.5 ** (1 / HALF_LIFE_VISITS)
        weights = [decay**age for age in range(len(visits))][::-1]
        used = [weight for weight, visit in zip(weights, visits, strict=True) if expert in visit]
        return sum(used) / sum(weights) if visits else 0.0

    def worth(self, expert: ExpertId) -> float:
        visits = self.visits(expert.layer)
        persistence = 0.0
        for end in range(2, len(visits)):  # the last visit may still be going on
            before, visit = visits[end - 2], visits[end - 1]
            surprises = [(one in visit) - self.popularity(one, visits[: end - 1]) for one in before]
            surprise = sum(surprises) / len(surprises)
            persistence += (surprise - persistence) / min(end, MEMORY_VISITS)
        worth = self.popularity(expert, visits)
        return worth + max(0, persistence) if visits and expert in visits[-1] else worth

    def victim(self, incoming: ExpertId, keep: set[ExpertId]) -> ExpertId | None:
        victim = super().victim(incoming, keep)
        if victim is None or victim.layer != incoming.layer:
            return victim
        passing = self.worst((incoming.layer - 1) % self.num_layers, keep)
        if passing and self.worth(passing) < PASS_ON_BELOW * self.worth(victim):
            return passing
        return victim


TWINS = {
    "global-lru": GlobalLruTwin,
    "layer-lru": Twin,
    "layer-lfu": LfuTwin,
    "next-visit": NextVisitTwin,
}


def assert_as_good(victim: ExpertId | None, twin: Twin, incoming: ExpertId, keep: set) -> None:
    """The twin's choice, or one whose worth differs by rounding alone."""
    expected = twin.victim(incoming, keep)
    if victim != expected:
        assert victim is not None
        assert expected is not None
        assert victim in twin.held - keep
        assert twin.worth(victim) == pytest.approx(twin.worth(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(25))
def test_policy_equals_its_twin_whatever_the_order_of_calls(name, seed):
    choose = random.Random(seed)
    num_layers, num_experts = choose.randint(1, 5), choose.randint(1, 6)
    capacity = choose.randint(1, num_layers * num_experts)  # often fewer than one a layer
    policy, twin = make_policy(name, capacity, num_layers), TWINS[name](capacity, num_layers)
    for _ in range(120):
        expert = ExpertId(choose.randrange(num_layers), choose.randrange(num_experts))
        assert (expert in policy) == (expert in twin.held)
        assert len(policy) == len(twin.held) <= capacity
        if expert in twin.held:
            call = "remove" if choose.random() < 0.1 else "touch"
            for one in (policy, twin):
                getattr(one, call)(expert)
            continue
        if len(twin.held) == capacity:
            rate = choose.choice([0, 0.3, 0.9, 1])
            keep = {one for one in sorted(twin.held) if choose.random() < rate}
            victim = policy.victim(expert, keep)
            assert victim not in keep
            assert (victim is None) == (keep == twin.held)
            assert_as_good(victim, twin, expert, keep)
            if victim is None:
                continue
            for one in (policy, twin):
                one.remove(victim)
        used = choose.random() < 0.8
        for one in (policy, twin):
            one.add(expert, used=used)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_policy_equals_its_twin_when_layers_are_visited_in_turn(name, seed):
    choose = random.Random(seed)
    num_layers, num_experts, top_k = 3, 6, choose.randint(1, 4)
    capacity = choose.randint(2, 12)
    policy, twin = make_policy(name, capacity, num_layers), TWINS[name](capacity, num_layers)
    for step in range(40):
        layer = step % num_layers
        wanted = [ExpertId(layer, one) for one in choose.sample(range(num_experts), top_k)]
        for expert in sorted(wanted, key=lambda one: one not in twin.held):
            if expert in twin.held:
                for one in (policy, twin):
                    one.touch(expert)
                continue
            if len(twin.held) == capacity:
                victim = policy.victim(expert, set())
                assert_as_good(victim, twin, expert, set())
                for one in (policy, twin):
                    one.remove(victim)
            for one in (policy, twin):
                one.add(expert)


def test_weights_that_grow_are_scaled_back_without_a_change(monkeypatch):
    for module in ("policy", "policy_next_visit"):
        monkeypatch.setattr(f"moe_server.offload.{module}._RESCALE_AT", 1.5)
    for name in ("layer-lfu", "next-visit"):
        for seed in range(4):
            test_policy_equals_its_twin_when_layers_are_visited_in_turn(name, seed)


def fill(policy, *experts: tuple[int, int]) -> None:
    for layer, expert in experts:
        policy.add(ExpertId(layer, expert))


LAYERED = [name for name in POLICIES if name != "global-lru"]


@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_that_has_its_share_gives_up_its_own(name):
    policy = make_policy(name, 4, 2)
    fill(policy, (0, 0), (0, 1), (1, 0), (1, 1))
    policy.touch(ExpertId(1, 0))
    assert policy.victim(ExpertId(1, 5), keep=()) == ExpertId(1, 1)


@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_gives_back_what_it_borrowed_first(name):
    policy = make_policy(name, 4, 2)
    fill(policy, (1, 0), (0, 0), (0, 1), (0, 2))
    assert policy.victim(ExpertId(1, 5), keep=()) == ExpertId(0, 0)


@pytest.mark.parametrize("name", LAYERED)
def test_what_must_be_taken_elsewhere_is_taken_where_it_is_needed_latest(name):
    policy = make_policy(name, 4, 4)
    fill(policy, (0, 0), (1, 0), (2, 0), (3, 0))
    assert policy.victim(ExpertId(2, 1), keep={ExpertId(2, 0)}) == ExpertId(1, 0)
    assert policy.victim(ExpertId(0, 1), keep={ExpertId(0, 0)}) == ExpertId(3, 0)


@pytest.mark.parametrize("name", LAYERED)
def test_experts_on_their_way_do_not_cost_other_layers_theirs(name):
    policy = make_policy(name, 4, 2)
    fill(policy, (0, 0), (0, 1), (1, 0), (1, 1))
    policy.remove(policy.victim(ExpertId(1, 2), keep=()))  # 1, 2 is being read
    assert policy.victim(ExpertId(1, 3), keep=()) == ExpertId(1, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_a_layer_without_a_share_can_still_run(name):
    policy = make_policy(name, 1, 4)
    fill(policy, (0, 0))
    assert policy.victim(ExpertId(3, 0), keep=()) == ExpertId(0, 0)


@pytest.mark.parametrize("name", LAYERED)
def test_what_was_fetched_ahead_counts_once_it_is_used(name):
    """Fetched and used is one use, not two: an expert that is used as often later outlives it."""
    policy = make_policy(name, 2, 1)
    policy.add(ExpertId(0, 0), used=False)
    policy.touch(ExpertId(0, 0))
    policy.add(ExpertId(0, 1))
    assert policy.victim(ExpertId(0, 2), keep=()) == ExpertId(0, 0)


def popular_then_scan(policy, num_scans: int) -> None:
    """One layer, two slots: 0 and 1 are used in ten steps, then a prompt uses all six experts."""
    fill(policy, (0, 0), (0, 1))
    for step in range(20):
        policy.touch(ExpertId(0, step % 2))
    for _ in range(num_scans):
        policy.touch(ExpertId(0, 0))
        for number in range(1, 6):
            expert = ExpertId(0, number)
            if expert in policy:
                policy.touch(expert)
                continue
            policy.remove(policy.victim(expert, keep=()))
            policy.add(expert)


@pytest.mark.parametrize("name", ["layer-lfu", "next-visit"])
def test_a_popular_expert_survives_the_scan_of_a_prompt(name):
    policy = make_policy(name, 2, 1)
    popular_then_scan(policy, 1)
    assert {one for one in range(6) if ExpertId(0, one) in policy} & {0, 1}
    lru = make_policy("layer-lru", 2, 1)
    popular_then_scan(lru, 1)
    assert not {one for one in range(6) if ExpertId(0, one) in lru} & {0, 1}


def test_a_slot_passes_on_from_a_rare_expert_of_the_layer_before():
    policy = make_policy("next-visit", 4, 2)
    for _ in range(10):
        for layer, expert in ((0, 0), (1, 0), (1, 1)):
            one = ExpertId(layer, expert)
            policy.touch(one) if one in policy else policy.add(one)
    policy.add(ExpertId(0, 1))  # once in ten steps
    for expert in (ExpertId(1, 0), ExpertId(1, 1)):
        policy.touch(expert)
    policy.touch(ExpertId(0, 0))
    assert policy.victim(ExpertId(1, 2), keep=()) == ExpertId(0, 1)
    assert policy.victim(ExpertId(1, 2), keep={ExpertId(0, 1)}) == ExpertId(1, 0)


def test_next_visit_takes_nothing_from_a_layer_that_was_filled_and_never_visited():
    policy = make_policy("next-visit", 6, num_layers=2)
    for layer in (0, 1):
        for expert in range(3):
            policy.add(ExpertId(layer, expert), used=False)
    for expert in range(3):
        policy.touch(ExpertId(0, expert))
    for expert in range(3, 8):
        victim = policy.victim(ExpertId(0, expert), keep=())
        assert victim.layer == 0
        policy.remove(victim)
        policy.add(ExpertId(0, expert))


COUNTING = ["layer-lfu", "next-visit"]


@pytest.mark.parametrize("name", COUNTING)
def test_what_was_expected_to_be_wanted_most_goes_last(name):
    policy = make_policy(name, 4, 1)
    shares = [0.1, 0.6, 0.3, 0.5, 0.2]
    policy.expect(0, shares)
    for one in range(4):
        policy.add(ExpertId(0, one), used=False)
    given = []
    while len(policy):
        victim = policy.victim(ExpertId(0, 4), keep=())
        policy.remove(victim)
        given.append(shares[victim.expert])
    assert given == [0.1, 0.3, 0.5, 0.6]


@pytest.mark.parametrize("name", COUNTING)
def test_experts_that_are_scanned_through_do_not_displace_what_is_expected(name):
    num_layers, num_experts, capacity = 3, 8, 12
    hot = {ExpertId(layer, one) for layer in range(num_layers) for one in range(4)}
    policy = make_policy(name, capacity, num_layers)
    for layer in range(num_layers):
        policy.expect(layer, [0.5] * 4 + [0.05] * 4)
    for expert in hot:
        policy.add(expert, used=False)
    for _ in range(6):
        for layer in range(num_layers):
            everything = [ExpertId(layer, one) for one in range(num_experts)]
            missing = [expert for expert in everything if expert not in policy]
            for expert in everything:
                if expert not in missing:
                    policy.touch(expert)
            for expert in missing:
                policy.remove(policy.victim(expert, keep=()))
                policy.add(expert)
    assert sum(expert in policy for expert in hot) >= capacity - num_layers


@pytest.mark.parametrize("name", COUNTING)
def test_what_the_policy_has_seen_itself_counts_if_it_is_more(name):
    policy = make_policy(name, 2, 1)
    fill(policy, (0, 0), (0, 1))
    for _ in range(20):
        policy.touch(ExpertId(0, 0))
    policy.expect(0, [0.001, 0.01, 0.9])
    assert policy.victim(ExpertId(0, 2), keep=()) == ExpertId(0, 1)
