"""What a step costs on the mission's hardware: a roofline, and hit rates from replayed traces.

Mixtral 8x7B on an A100 within a budget; experts without a slot are in pinned host memory behind
PCIe 4. A step takes as long as the slowest of computing, reading weights and KV cache from device
memory, and copying missing experts, as if these overlapped perfectly and Python cost nothing: the
simulated day is a bound, not a promise. Knows no requests.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

LAYERS, EXPERTS, TOP_K = 32, 8, 2
RUNTIME_BYTES = 600e6
"""The CUDA context and its libraries."""
WORKSPACE_BYTES_PER_TOKEN = 0.4e6
"""Of a step: activations, and two experts' staging beside."""
DENSE_BYTES = 3.2e9
KV_BYTES_PER_TOKEN = 128 * 1024
EXPERT_BYTES = {"bf16": 352.3e6, "int4": 95e6}
MEMORY_BYTES_PER_S = 1.55e12
COPY_BYTES_PER_S = 25e9
COMPUTE_S_PER_TOKEN = 0.35 / 2048
"""In prompts: 2,048 tokens take 0.35 s."""

HIT_RATES = {
    1: ((0, 0), (32, 0.152), (64, 0.309), (96, 0.424), (128, 0.54), (170, 0.692), (200, 0.801)),
    8: ((0, 0), (32, 0.098), (64, 0.226), (96, 0.356), (128, 0.486), (170, 0.655), (200, 0.776)),
}
"""By tokens of a step: (slots of 256, hit rate), `next-visit` on traces as local as the Mixtral
paper's; see LOG.md, replay of eviction policies. More tokens than 8 want all experts anyway."""


@dataclass(frozen=True)
class StepCost:
    """Seconds, each as if the others were free."""

    compute_s: float
    memory_s: float
    copy_s: float

    @property
    def total_s(self) -> float:
        return max(self.compute_s, self.memory_s, self.copy_s)


@dataclass(frozen=True)
class Hardware:
    """The mission's, with memory divided for one configuration.

    Args:
        format: bf16 | int4.
        kv_tokens: Of the KV cache.
        max_batch_tokens: Of a step.
        device_gib: Of GPU memory that may be used.
    """

    format: str
    kv_tokens: int
    max_batch_tokens: int
    device_gib: int = 24

    @cached_property
    def num_slots(self) -> int:
        """Of 256: what is left beside everything else."""
        kv_bytes = self.kv_tokens * KV_BYTES_PER_TOKEN
        workspace = self.max_batch_tokens * WORKSPACE_BYTES_PER_TOKEN
        left = self.device_gib * 2**30 - RUNTIME_BYTES - DENSE_BYTES - kv_bytes - workspace
        return max(1, min(LAYERS * EXPERTS, int(left / EXPERT_BYTES[self.format])))

    def step(self, num_tokens: int, context_tokens: int) -> StepCost:
        """What a step costs.

        Args:
            num_tokens: New ones of all requests.
            context_tokens: Of the KV cache that it reads.
        """
        # Uniform routing: 16 tokens touch 7.9 of 8.
        touched = LAYERS * EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** num_tokens)
        missing = touched * (1 - self.hit_rate(num_tokens))
        expert_bytes = EXPERT_BYTES[self.format]
        read = DENSE_BYTES + touched * expert_bytes + context_tokens * KV_BYTES_PER_TOKEN
        return StepCost(
            compute_s=num_tokens * COMPUTE_S_PER_TOKEN,
            memory_s=read / MEMORY_BYTES_PER_S,
            copy_s=missing * expert_bytes / COPY_BYTES_PER_S,
        )

    def hit_rate(self, num_tokens: int) -> float:
        """The share of the wanted experts that have a slot."""
        alone, among = self._hit_rates
        share = min(1.0, (num_tokens - 1) / 7)
        return alone + share * (among - alone)

    @cached_property
    def _hit_rates(self) -> tuple[float, float]:
        """Of one token, and of 8 and more."""
        alone, among = (_interpolated(HIT_RATES[size], self.num_slots) for size in (1, 8))
        return alone, among


def _interpolated(points: tuple[tuple[float, float], ...], at: float) -> float:
    points = (*points, (LAYERS * EXPERTS, 1.0))
    index = max(1, bisect_left([x for x, _ in points], at))
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
