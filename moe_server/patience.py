"""How long the supervisor waits for its engine before it concludes or tries again."""

from dataclasses import dataclass

from moe_server.config import ModelConfig

SLOW_DISK_S = 30.0
"""For one block of a few MiB, with retries."""

SLOW_SAMPLING_S = 0.2
"""One request's token with penalties and log-probabilities: measured 0.06 s for 100,000 ids."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the supervisor waits before it concludes or tries again; all in seconds."""

    first_message_s: float = 60.0
    loading_s: float = 300.0
    """The longest stage without progress: importing torch from a cold disk, or pinning memory."""
    idle_s: float = 10.0
    """An engine without requests sends a heartbeat every 0.5 s."""
    busy_s: float = 60.0
    """The longest that a step may take while nothing comes from disk; see `longest_step_s`."""
    pulse_s: float = 5.0
    """A process that works, whatever at, has a pulse every 0.25 s."""
    loading_pulse_s: float = 60.0
    """Libraries that come from a cold disk hold up all threads of a Python process."""
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 30.0
    """The backoff doubles with every loss up to this."""
    steady_s: float = 60.0
    """A life that was READY for so long resets the backoff."""
    shutdown_s: float = 5.0
    proof_again_s: float = 30.0
    """Until a proof that failed is tried again."""


def longest_step_s(config: ModelConfig, num_active_parameters: int) -> float:
    """How long a step may take while nothing comes from disk before the engine counts as hung.

    It computes up to max_batch_tokens and samples for every running request. The rates are
    pessimistic on purpose: killing a slow engine helps nobody. (Bytes that arrive are a sign of
    life, so the slowness of a disk does not matter, nor how much of a model is on it.)
    """
    slow_flops = 10e9 if config.device == "cpu" else 1e12
    flops = 2 * num_active_parameters * config.scheduler.max_batch_tokens
    sampling_s = config.scheduler.max_running * SLOW_SAMPLING_S
    return SLOW_DISK_S + flops / slow_flops + sampling_s
