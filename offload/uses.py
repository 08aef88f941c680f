"""How often each expert was wanted of late: what is worth having in memory at a start.

A policy's own counts do not serve for that. They are a tier's and not the model's, two policies
keep none, and they forget within 32 visits so as to follow a topic; these outlive a storm of other
traffic. A visit counts once however many rows wanted an expert: a slot saves one read, whoever
reads. Counted in visits of a layer, of which each step makes one.

Knows layers and experts, no bytes. The engine's one thread writes and reads it.
"""

from collections.abc import Sequence

from moe_server.offload.layout import ExpertId

HALF_LIFE_VISITS = 4096
"""Of a use's weight: an hour at one step a second, some minutes at twenty."""
_GROWTH = 2 ** (1 / HALF_LIFE_VISITS)
_RESCALE_AT = 1e100


class Uses:
    """Of every layer's visits, the share that wanted each expert; later ones count more.

    Args:
        num_layers: Layers of the model.
        num_experts: Experts of each.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts = [[0.0] * num_experts for _ in range(num_layers)]
        self._totals = [0.0] * num_layers
        self._weights = [1.0] * num_layers
        """What a visit counts now. It grows instead of all counts shrinking."""
        self.num_noted = 0
        """Visits since this was made."""

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """A step's visit to a layer wanted these experts, each named once; no visit if none."""
        if not experts:
            return
        counts, weight = self._counts[layer], self._weights[layer]
        for expert in experts:
            counts[expert] += weight
        self._totals[layer] += weight
        self._weights[layer] = weight = weight * _GROWTH
        self.num_noted += 1
        if weight > _RESCALE_AT:
            self._counts[layer] = [count / weight for count in counts]
            self._totals[layer] /= weight
            self._weights[layer] = 1.0

    def visits(self) -> list[float]:
        """How many visits each layer's shares rest on, older ones counting less."""
        return [total / weight for total, weight in zip(self._totals, self._weights, strict=True)]

    def shares(self) -> list[list[float]]:
        """For each layer, the share of its visits that wanted each expert; 0 before the first."""
        return [
            [count / total if total else 0.0 for count in counts]
            for counts, total in zip(self._counts, self._totals, strict=True)
        ]

    def restore(self, visits: Sequence[float], shares: Sequence[Sequence[float]]) -> None:
        """Goes on from what an earlier one of this model had found; from nothing if both are empty.

        Args:
            visits: As `visits` gives them.
            shares: As `shares` gives them.
        """
        for counts in self._counts:
            counts[:] = [0.0] * len(counts)
        self._totals = [0.0] * len(self._counts)
        for layer, (total, of_layer) in enumerate(zip(visits, shares, strict=True)):
            self._counts[layer] = [total * share for share in of_layer]
            self._totals[layer], self._weights[layer] = total, 1.0

    def share(self, expert: ExpertId) -> float:
        """The share of its layer's visits that wanted the expert."""
        total = self._totals[expert.layer]
        return self._counts[expert.layer][expert.expert] / total if total else 0.0

    def ranked(self) -> list[ExpertId]:
        """All experts: the first of every layer, then the second of every layer, and so on.

        Any beginning of it is an equal share of each layer, which is what policies keep. Of equals
        the lower number comes first.
        """
        ranking = [
            sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
            for counts in self._counts
        ]
        return [
            ExpertId(layer, experts[rank])
            for rank in range(len(ranking[0]) if ranking else 0)
            for layer, experts in enumerate(ranking)
        ]
