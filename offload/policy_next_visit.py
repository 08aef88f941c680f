"""The policy that estimates how likely each expert is to be wanted at its layer's next visit.

The layers of a model are visited in cyclic order, each once a step. So what a slot is worth is the
probability that the expert in it is wanted at its layer's *next visit*. It is estimated from uses
alone, as the sum of two things:

- *Popularity*: the share of the layer's visits that used the expert, older visits counting less
  (recency and frequency combined by one decay, as in LRFU: Lee et al., IEEE Transactions on
  Computers 50(12), 2001). A visit counts once however many tokens wanted the expert, and a prompt's
  visit, which uses all experts, leaves their order as it was: experts that are scanned through
  displace each other.
- *Persistence*: how much likelier than by its popularity an expert is to be wanted again right
  after it was (0.1 in Mixtral's middle layers, 0 in its first: arXiv:2401.04088, table 5). Measured
  for each layer, it makes the order that of LRU where routing has locality, and that of frequency
  where it has none.

Every layer has an equal quota, but a slot may pass on: where the least likely expert of the layer
visited just before is far less likely than all of this layer's, it goes instead. So the slot that a
rarely used expert had to pass through travels with the visits, and is not taken from each layer's
best. Taking from any other layer would take from one that is needed sooner.

Knows layers and experts, no bytes and no cache; `policy.make_policy` makes it.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from moe_server.offload.layout import ExpertId
from moe_server.offload.policy_quotas import Quotas

HALF_LIFE_VISITS = 32
"""Of a use's weight in popularity: long enough to average, short enough to follow a new topic."""
MEMORY_VISITS = 64
"""Visits that persistence is averaged over."""
PASS_ON_BELOW = 0.5
"""A slot passes on from an expert that is less likely than this times the layer's least likely one.
At 1 estimates that differ by chance move slots: 2 points fewer hits where routing is uniform."""
_GROWTH = 2 ** (1 / HALF_LIFE_VISITS)
_RESCALE_AT = 1e100


def least_used(
    candidates: list[int],
    uses: Mapping[int, float],
    held: Mapping[int, ExpertId],
    keep: Container[ExpertId],
) -> int | None:
    """The candidate with the fewest uses outside `keep`, of equals the first; empties the list."""
    while candidates:
        least = min(candidates, key=uses.__getitem__)
        if held[least] not in keep:
            return least
        candidates.remove(least)
    return None


@dataclass(slots=True)
class _Layer:
    """What is known about a layer."""

    held: dict[int, ExpertId] = field(default_factory=dict)
    """In order of use."""
    uses: dict[int, float] = field(default_factory=dict)
    """Visits that used an expert, each with its weight. Outlives eviction."""
    weight: float = 1.0
    """The present visit's. It grows instead of all uses shrinking."""
    total: float = 0.0
    """Sum of all visits' weights: uses / total is popularity."""
    now: set[int] = field(default_factory=set)
    """Experts used in the present visit, or in the last one while other layers are visited."""
    before: set[int] = field(default_factory=set)
    """Experts used in the visit before that."""
    persistence: float = 0.0
    num_visits: int = 0

    def worth(self, expert: int) -> float:
        """How likely the expert is wanted at the next visit; the order counts, not the value."""
        popularity = self.uses[expert] / self.total if self.total else 0.0
        return popularity + max(0.0, self.persistence) if expert in self.now else popularity

    def least_likely(self, keep: Container[ExpertId]) -> tuple[float, ExpertId] | None:
        """The held expert of least worth outside `keep`, and its worth."""
        if self.held:
            # Mostly it is the rarest one. Found without a Python call for each: layers can be wide.
            rarest = min(self.held, key=self.uses.__getitem__)
            if rarest not in self.now and self.held[rarest] not in keep:
                return self.worth(rarest), self.held[rarest]
        rested = [expert for expert in self.held if expert not in self.now]
        used = [expert for expert in self.held if expert in self.now]
        least = [least_used(group, self.uses, self.held, keep) for group in (rested, used)]
        found = [(self.worth(one), self.held[one]) for one in least if one is not None]
        return min(found, key=lambda one: one[0], default=None)

    def begin_visit(self) -> None:
        """A new visit begins; what the last one taught about persistence is learnt now."""
        if self.before:
            total = self.total - self.weight  # as it was before the last visit
            expected = sum(
                self.uses[expert] - self.weight * (expert in self.now) for expert in self.before
            )
            surprise = (len(self.now & self.before) - expected / total) / len(self.before)
            self.persistence += (surprise - self.persistence) / min(self.num_visits, MEMORY_VISITS)
        self.num_visits += 1
        self.before, self.now = self.now, set()
        self.weight *= _GROWTH
        self.total += self.weight
        if self.weight > _RESCALE_AT:
            for expert in self.uses:
                self.uses[expert] /= self.weight
            self.total /= self.weight
            self.weight = 1.0

    def expect(self, shares: Sequence[float]) -> None:
        if not self.total:
            self.total = self.weight / (1 - 1 / _GROWTH)  # of visits without end
        for expert, share in enumerate(shares):
            self.uses[expert] = max(self.uses.get(expert, 0.0), share * self.total)

    def use(self, expert: int) -> None:
        self.now.add(expert)
        self.uses[expert] += self.weight


class NextVisit:
    """Evicts the expert that is least likely to be wanted at its layer's next visit.

    Args:
        capacity: Experts the tier holds.
        num_layers: Layers that share it.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        self._quotas = Quotas(capacity, num_layers)
        self._layers = [_Layer() for _ in range(num_layers)]
        self._visited = -1
        """The layer whose visit is going on."""

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._layers[expert.layer].held

    def __len__(self) -> int:
        return self._quotas.total

    def add(self, expert: ExpertId, *, used: bool = True) -> None:
        assert expert not in self
        self._quotas.add(expert.layer)
        layer = self._layers[expert.layer]
        layer.held[expert.expert] = expert
        layer.uses.setdefault(expert.expert, 0.0)
        if used:
            self._use(expert)

    def remove(self, expert: ExpertId) -> None:
        del self._layers[expert.layer].held[expert.expert]
        self._quotas.remove(expert.layer)

    def touch(self, expert: ExpertId) -> None:
        held = self._layers[expert.layer].held
        held[expert.expert] = held.pop(expert.expert)
        self._use(expert)

    def expect(self, layer: int, shares: Sequence[float]) -> None:
        self._layers[layer].expect(shares)

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        for layer in self._quotas.givers(incoming.layer):
            given = self._layers[layer].least_likely(keep)
            if given is None:
                continue
            if layer == incoming.layer:
                # The layer before the first (-1) is the last. Of one that was never visited, but
                # filled ahead of the first prompt, nothing is known to be unlikely.
                before = self._layers[layer - 1]
                passing = before.least_likely(keep) if before.num_visits else None
                if passing and passing[0] < PASS_ON_BELOW * given[0]:
                    return passing[1]
            return given[1]
        return None

    def _use(self, expert: ExpertId) -> None:
        """A visit begins where another layer was used last, or an expert is used once more."""
        layer = self._layers[expert.layer]
        if expert.layer != self._visited or expert.expert in layer.now:
            self._visited = expert.layer
            layer.begin_visit()
        layer.use(expert.expert)
