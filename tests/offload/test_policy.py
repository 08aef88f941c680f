"""The policy against a brute-force twin that knows nothing but when each expert was last used."""

import itertools
import random

import pytest

from moe_server.offload.layout import ExpertId
from moe_server.offload.policy import LayerLru


class Twin:
    """The words of LayerLru's docstrings, one after the other, and no care for speed."""

    def __init__(self, capacity: int, num_layers: int) -> None:
        self.capacity, self.num_layers = capacity, num_layers
        self.last_used = {}
        self.clock = itertools.count()

    def use(self, expert: ExpertId) -> None:
        self.last_used[expert] = next(self.clock)

    def held(self, layer: int) -> list[ExpertId]:
        """The layer's experts, least recently used first."""
        mine = [expert for expert in self.last_used if expert.layer == layer]
        return sorted(mine, key=lambda expert: self.last_used[expert])

    def excess(self, layer: int) -> int:
        share = len([place for place in range(self.capacity) if place % self.num_layers == layer])
        return len(self.held(layer)) - share

    def victim(self, incoming: ExpertId, keep: set[ExpertId]) -> ExpertId | None:
        by_excess = sorted(range(self.num_layers), key=lambda layer: (-self.excess(layer), layer))
        if self.excess(incoming.layer) >= 0:
            by_excess = [incoming.layer, *by_excess]
        for layer in by_excess:
            for expert in self.held(layer):
                if expert not in keep:
                    return expert
        return None


@pytest.mark.parametrize("seed", range(60))
def test_policy_equals_its_twin(seed):
    choose = random.Random(seed)
    num_layers, num_experts = choose.randint(1, 6), choose.randint(1, 6)
    capacity = choose.randint(1, num_layers * num_experts)  # often fewer than one a layer
    policy, twin = LayerLru(capacity, num_layers), Twin(capacity, num_layers)
    for _ in range(200):
        expert = ExpertId(choose.randrange(num_layers), choose.randrange(num_experts))
        held = list(twin.last_used)
        assert (expert in policy) == (expert in twin.last_used)
        assert len(policy) == len(held)
        if expert in twin.last_used:
            if choose.random() < 0.1:
                policy.remove(expert)
                del twin.last_used[expert]
            else:
                policy.touch(expert)
                twin.use(expert)
            continue
        if len(held) == capacity:
            keep = {one for one in held if choose.random() < choose.choice([0, 0.3, 0.9, 1])}
            victim = policy.victim(expert, keep)
            assert victim == twin.victim(expert, keep)
            assert (victim is None) == (keep == set(held))
            if victim is None:
                continue
            assert victim not in keep
            policy.remove(victim)
            del twin.last_used[victim]
        policy.add(expert)
        twin.use(expert)


def fill(policy: LayerLru, *experts: tuple[int, int]) -> None:
    for layer, expert in experts:
        policy.add(ExpertId(layer, expert))


def test_a_layer_that_has_its_share_gives_up_its_own():
    policy = LayerLru(4, 2)
    fill(policy, (0, 0), (1, 0), (0, 1), (1, 1))
    policy.touch(ExpertId(1, 0))
    assert policy.victim(ExpertId(1, 5), keep=()) == ExpertId(1, 1)


def test_a_layer_gives_back_what_it_borrowed_first():
    policy = LayerLru(4, 2)
    fill(policy, (1, 0), (0, 0), (0, 1), (0, 2))
    assert policy.victim(ExpertId(1, 5), keep=()) == ExpertId(0, 0)


def test_a_layer_without_a_share_can_still_run():
    policy = LayerLru(1, 4)
    fill(policy, (0, 0))
    assert policy.victim(ExpertId(3, 0), keep=()) == ExpertId(0, 0)


class GlobalLru:
    """What the page cache does."""

    def __init__(self) -> None:
        self.order = {}

    def touch(self, expert: ExpertId) -> None:
        self.order[expert] = self.order.pop(expert, None)

    add = touch

    def remove(self, expert: ExpertId) -> None:
        del self.order[expert]

    def victim(self, _incoming: ExpertId, keep: set[ExpertId]) -> ExpertId | None:
        return next((expert for expert in self.order if expert not in keep), None)


def hit_rate(policy, capacity: int, tokens: list[list[list[int]]]) -> float:
    """Replays tokens as `acquire` does: a layer's hits first, then its misses, one by one."""
    held, hits, total = set(), 0, 0
    for token in tokens:
        for layer, wanted in enumerate(token):
            experts = [ExpertId(layer, expert) for expert in wanted]
            present = [expert for expert in experts if expert in held]
            hits, total = hits + len(present), total + len(experts)
            for expert in present:
                policy.touch(expert)
            for expert in experts:
                if expert in present:
                    continue
                if len(held) == capacity:
                    victim = policy.victim(expert, set())
                    policy.remove(victim)
                    held.remove(victim)
                policy.add(expert)
                held.add(expert)
    return hits / total


def test_layers_visited_in_turn_hit_where_one_lru_over_all_never_does():
    num_layers, num_experts, capacity = 8, 8, 32
    choose = random.Random(0)
    tokens = [[choose.sample(range(num_experts), 5) for _ in range(num_layers)] for _ in range(200)]
    assert hit_rate(GlobalLru(), capacity, tokens) < 0.02
    assert hit_rate(LayerLru(capacity, num_layers), capacity, tokens) > 0.45
