"""What a token must cost when experts do not fit: the bytes that no cache of that size can avoid.

Routing of random weights is close to uniform. A layer's router picks k of E experts for each of T
tokens; E * (1 - (1 - k/E)^T) different ones are expected. A cache that keeps s of a layer's experts
finds the share s/E of them, whichever it keeps: without knowing the future it cannot do better.
With everything else of the capacity taken by the dense weights, that gives bytes per step, and
divided by the disk's bandwidth of the same minutes, a limit in time. Pure arithmetic.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """The sizes of a mixture of experts in one format."""

    num_layers: int
    num_experts: int
    """Of one layer."""
    top_k: int
    expert_bytes: int
    dense_bytes: int
    """Everything but the experts."""

    def distinct_experts(self, tokens: int) -> float:
        """Experts of one layer that `tokens` tokens need together, expected."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)

    def slots_per_layer(self, capacity_bytes: int) -> float:
        """Experts of one layer that fit, as a mean over the layers."""
        room = max(0, capacity_bytes - self.dense_bytes)
        return min(self.num_experts, room / self.expert_bytes / self.num_layers)

    def least_read_bytes(self, capacity_bytes: int, tokens: int) -> float:
        """Bytes that a step of `tokens` tokens reads with a per-layer cache, expected."""
        missing = 1 - self.slots_per_layer(capacity_bytes) / self.num_experts
        return self.num_layers * self.distinct_experts(tokens) * missing * self.expert_bytes
