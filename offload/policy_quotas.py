"""How many experts each layer of a tier may keep, and which layer gives one up.

Layers are visited in cyclic order, so of all layers the one visited last is needed again latest:
what must be taken from another layer is taken there. Knows layers and counts; which of a layer's
experts goes is the policy's business.
"""

from collections.abc import Iterator


class Quotas:
    """Counts per layer against quotas that sum to the tier's capacity.

    Args:
        capacity: Experts the tier holds.
        num_layers: Layers that share it equally; the first ones get what is left over.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        share, rest = divmod(capacity, num_layers)
        self.quota = [share + (layer < rest) for layer in range(num_layers)]
        self.held = [0] * num_layers
        self.total = 0
        """Experts held by all layers."""
        self._capacity = capacity

    def add(self, layer: int) -> None:
        """The layer holds one more."""
        assert self.total < self._capacity
        self.held[layer] += 1
        self.total += 1

    def remove(self, layer: int) -> None:
        """The layer holds one less."""
        self.held[layer] -= 1
        self.total -= 1

    def givers(self, layer: int) -> Iterator[int]:
        """Layers that an expert of `layer` may displace one of, in the order they should give.

        A layer that has its quota gives itself. One below it takes from those above theirs; there
        may be none, as experts on their way are held by nobody, and then it gives itself too. Where
        all of these must be kept, any layer gives, whatever its quota: the tier cannot be stuck.
        """
        if self.held[layer] >= self.quota[layer]:
            yield layer
        for other in self._before(layer):
            if self.held[other] > self.quota[other]:
                yield other
        yield layer
        yield from self._before(layer)

    def _before(self, layer: int) -> Iterator[int]:
        """The other layers, from the one visited before `layer` backwards."""
        yield from range(layer - 1, -1, -1)
        yield from range(len(self.held) - 1, layer, -1)
