"""Who stays: the eviction policies of a tier. Pure Python, no torch, replayable on recorded traces.

Layers are visited in cyclic order, so one LRU over all experts evicts exactly what the next token
needs first: with 32 of 256 experts held it hits 0 % where a quota per layer hits 15 % (replayed on
traces with the Mixtral paper's locality, arXiv:2401.04088, table 5). Hence every policy but that
one ranks the experts of a layer among themselves, and `policy_quotas` says which layer gives.

`benchmarks/policy_replay.py` compares them. The cache makes them by name, with `make_policy`.
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Protocol

from moe_server.offload.layout import ExpertId
from moe_server.offload.policy_next_visit import NextVisit, least_used
from moe_server.offload.policy_quotas import Quotas

LFU_HALF_LIFE_USES = 64
"""Of a use's weight, in uses of its layer: 32 tokens at batch 1 and top-2, 9 steps at batch 8."""

_RESCALE_AT = 1e100


class Policy(Protocol):
    """What a tier's bookkeeping asks and tells. Costs grow with a layer's experts, not the tier's.

    A victim is removed when `incoming` begins to be fetched, and that is added when it has arrived.
    """

    def __contains__(self, expert: ExpertId) -> bool: ...

    def __len__(self) -> int: ...

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        """The tier now holds `expert`; not `used`: it was fetched ahead of its first use."""

    def remove(self, expert: ExpertId) -> None:
        """The tier no longer holds `expert`."""

    def touch(self, expert: ExpertId) -> None:
        """`expert`, which is held, was used."""

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        """The expert to evict for `incoming`; None if all that are held are in `keep`."""


class TierPolicy(Policy, Protocol):
    """A policy that can be told what was seen before it."""

    def expect(self, layer: int, shares: Sequence[float]) -> None:
        """Each expert of the layer was wanted by such a share of the visits before this policy's.

        What the policy itself has seen of one to be wanted more often counts instead.
        """


class GlobalLru:
    """Least recently used of all layers together: what the page cache does, as a yardstick.

    Args:
        capacity: Experts the tier holds.
        num_layers: Of no consequence here.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        del num_layers
        self._capacity = capacity
        self._held: OrderedDict[ExpertId, None] = OrderedDict()

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._held

    def __len__(self) -> int:
        return len(self._held)

    def add(self, expert: ExpertId, *, used: bool = True) -> None:  # noqa: ARG002
        assert expert not in self._held
        assert len(self._held) < self._capacity
        self._held[expert] = None

    def remove(self, expert: ExpertId) -> None:
        del self._held[expert]

    def touch(self, expert: ExpertId) -> None:
        self._held.move_to_end(expert)

    def expect(self, layer: int, shares: Sequence[float]) -> None:
        """Of no consequence: recency is all that counts."""

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:  # noqa: ARG002
        return next((expert for expert in self._held if expert not in keep), None)


class LayerLru:
    """Least recently used within each layer, every layer with an equal share of the capacity.

    A layer may exceed its share while others do not use theirs; it gives back first.

    Args:
        capacity: Experts the tier holds.
        num_layers: Layers that share it.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        self._quotas = Quotas(capacity, num_layers)
        self._held: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(num_layers)]

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._held[expert.layer]

    def __len__(self) -> int:
        return self._quotas.total

    def add(self, expert: ExpertId, *, used: bool = True) -> None:  # noqa: ARG002
        assert expert not in self
        self._quotas.add(expert.layer)
        self._held[expert.layer][expert] = None

    def remove(self, expert: ExpertId) -> None:
        del self._held[expert.layer][expert]
        self._quotas.remove(expert.layer)

    def touch(self, expert: ExpertId) -> None:
        self._held[expert.layer].move_to_end(expert)

    def expect(self, layer: int, shares: Sequence[float]) -> None:
        """Of no consequence: recency is all that counts."""

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        for layer in self._quotas.givers(incoming.layer):
            for expert in self._held[layer]:
                if expert not in keep:
                    return expert
        return None


class LayerLfu:
    """Least frequently used within each layer, uses weighing half as much after a half-life.

    Counts outlive eviction: what comes back is no stranger. Of equals the least recently used goes.

    Args:
        capacity: Experts the tier holds.
        num_layers: Layers that share it, equally.
        half_life_uses: In uses of the layer.
    """

    def __init__(
        self, capacity: int, num_layers: int, half_life_uses: float = LFU_HALF_LIFE_USES
    ) -> None:
        self._quotas = Quotas(capacity, num_layers)
        self._held: list[dict[int, ExpertId]] = [{} for _ in range(num_layers)]
        """In order of use."""
        self._counts: list[dict[int, float]] = [{} for _ in range(num_layers)]
        self._weights = [1.0] * num_layers
        """What a use counts now. It grows instead of all counts shrinking."""
        self._growth = 2 ** (1 / half_life_uses)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._held[expert.layer]

    def __len__(self) -> int:
        return self._quotas.total

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        assert expert not in self
        self._quotas.add(expert.layer)
        self._held[expert.layer][expert.expert] = expert
        self._counts[expert.layer].setdefault(expert.expert, 0.0)
        if used:
            self._count(expert)

    def remove(self, expert: ExpertId) -> None:
        del self._held[expert.layer][expert.expert]
        self._quotas.remove(expert.layer)

    def touch(self, expert: ExpertId) -> None:
        held = self._held[expert.layer]
        held[expert.expert] = held.pop(expert.expert)
        self._count(expert)

    def expect(self, layer: int, shares: Sequence[float]) -> None:
        counts, whole = self._counts[layer], sum(shares)
        # What uses without end would have summed up to.
        total = self._weights[layer] / (1 - 1 / self._growth)
        for expert, share in enumerate(shares):
            if share:
                counts[expert] = max(counts.get(expert, 0.0), total * share / whole)

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        for layer in self._quotas.givers(incoming.layer):
            held = self._held[layer]
            given = least_used(list(held), self._counts[layer], held, keep)
            if given is not None:
                return held[given]
        return None

    def _count(self, expert: ExpertId) -> None:
        layer = expert.layer
        counts, weight = self._counts[layer], self._weights[layer] * self._growth
        counts[expert.expert] += weight
        self._weights[layer] = weight
        if weight > _RESCALE_AT:
            for other in counts:
                counts[other] /= weight
            self._weights[layer] = 1.0


POLICIES: dict[str, type[GlobalLru | LayerLru | LayerLfu | NextVisit]] = {
    "global-lru": GlobalLru,
    "layer-lru": LayerLru,
    "layer-lfu": LayerLfu,
    "next-visit": NextVisit,
}
"""By the name that the configuration gives them."""

DEFAULT_POLICY = "next-visit"
"""It reads up to 23 % less than layer-lru where experts are not equally popular, and at most 1.1 %
more on any trace that was replayed (benchmarks/LOG.md, 2026-11-24)."""


def make_policy(name: str, capacity: int, num_layers: int) -> TierPolicy:
    """A policy for an empty tier.

    Args:
        name: A key of POLICIES.
        capacity: Experts the tier holds.
        num_layers: Layers that share it.
    """
    return POLICIES[name](capacity, num_layers)
