"""What a probe may take: the operator's limits, or those that the measured roofline gives.

A start measures how long one resident expert takes and how fast the disk reads. From these and from
how many experts have no place in memory follows what a prompt and a token should take; the default
limits leave SLACK times that, and a constant for everything that is not weights. They are there to
catch a machine that is not as it should be, not to promise a service level: that is the operator's.
"""

import math
from dataclasses import dataclass

from moe_server.budget import MemoryPlan
from moe_server.config import WarmupConfig
from moe_server.warmup.probe import Probe

SLACK = 4.0
TTFT_CONSTANT_S = 1.0
TPOT_CONSTANT_S = 0.25
SLOW_COPY_BYTES_PER_S = 5e9
"""Where nothing has been copied yet: a slow bus, or the memory of a small machine."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a start has measured; 0: not known."""

    expert_s: float = 0.0
    """One expert that is on the device, with one row."""
    disk_bytes_per_s: float = 0.0
    copy_bytes_per_s: float = 0.0
    """From host memory to the device."""

    def best_of(self, other: "Speeds") -> "Speeds":
        """A machine that was once this fast can be so again: what ails it excuses nothing."""
        known = [one.expert_s for one in (self, other) if one.expert_s]
        return Speeds(
            min(known, default=0.0),
            max(self.disk_bytes_per_s, other.disk_bytes_per_s),
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What a prompt and a token have to compute and to bring in."""

    num_layers: int
    num_experts: int
    """Of a layer."""
    num_experts_per_token: int
    plan: MemoryPlan

    def step_s(self, num_tokens: int, speeds: Speeds) -> float:
        """Seconds of one step with so many tokens, each with experts of its own choice."""
        plan = self.plan
        wanted = min(self.num_experts, num_tokens * self.num_experts_per_token)
        share = wanted / max(1, plan.num_experts_total)
        read_s = plan.expert_bytes / speeds.disk_bytes_per_s if speeds.disk_bytes_per_s else 0.0
        copy_s = plan.expert_bytes / (speeds.copy_bytes_per_s or SLOW_COPY_BYTES_PER_S)
        away_s = share * (plan.num_absent * read_s + plan.num_records * copy_s)
        # What is dense takes as long as experts of as many bytes do.
        dense_s = speeds.expert_s * plan.dense_bytes / max(1, plan.expert_bytes)
        return dense_s + self.num_layers * (wanted * speeds.expert_s + away_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest that a probe may take, in milliseconds; infinite: any time."""

    max_ttft_ms: float = math.inf
    """Time to first token."""
    max_tpot_ms: float = math.inf
    """Time per output token after the first."""

    @classmethod
    def of(cls, config: WarmupConfig, work: Work, speeds: Speeds, prompt_tokens: int) -> "Limits":
        """The configured ones, and for those that are unset what the roofline says.

        Any time where no expert was measured: a dense model has none.
        """

        def unset_ms(num_tokens: int, constant_s: float) -> float:
            if not speeds.expert_s:
                return math.inf
            return 1000 * (SLACK * work.step_s(num_tokens, speeds) + constant_s)

        max_ttft_ms, max_tpot_ms = config.max_ttft_ms, config.max_tpot_ms
        return cls(
            unset_ms(prompt_tokens, TTFT_CONSTANT_S) if max_ttft_ms is None else max_ttft_ms,
            unset_ms(1, TPOT_CONSTANT_S) if max_tpot_ms is None else max_tpot_ms,
        )

    def missed(self, probe: Probe) -> str:
        """Which limits a probe missed and by how much; empty where it kept them."""
        measured = (
            ("time to first token", "max_ttft_ms", 1000 * probe.ttft_s, self.max_ttft_ms),
            ("time per output token", "max_tpot_ms", 1000 * probe.tpot_s, self.max_tpot_ms),
        )
        return "; ".join(
            f"{what} {took_ms:.1f} ms, {took_ms - limit_ms:.1f} ms over {key} = {limit_ms:.10g}"
            for what, key, took_ms, limit_ms in measured
            if took_ms > limit_ms
        )
