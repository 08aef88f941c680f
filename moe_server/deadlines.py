"""Which waiting requests cannot make their deadline, so that they are refused at once.

Everything is taken at its best: steps as fast as the fastest so far, requests before it that end at
their first token if they may, KV blocks that are always there, prompts that another one computes
anyway. What is refused would have missed its deadline, unless requests before it are given up, or
the engine becomes faster than it ever was. The engine asks before each step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile

from moe_server.errors import MoeServerError, Reason
from moe_server.scheduler import Scheduler
from moe_server.sequence import Sequence
from moe_server.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class Hopeless:
    """A request that cannot finish in time. Seconds from now on, at least."""

    sequence: Sequence
    left_s: float
    """Until its deadline."""
    before_s: float
    """For the prompts before its own."""
    prefill_s: float
    token_s: float
    """For each token after the first."""

    @property
    def alone_s(self) -> float:
        return self.prefill_s + (self.sequence.request.fewest_new_tokens - 1) * self.token_s

    def error(self) -> MoeServerError:
        """Why it is refused, and what would fit."""
        request = self.sequence.request
        work = f"a prompt of {len(request.token_ids)} tokens"
        if request.fewest_new_tokens > 1:
            work += f" and {request.fewest_new_tokens} new ones"
        takes = f"{work} take at least {self.alone_s:.2f} s by the fastest steps so far"
        left = f"{max(0.0, self.left_s):.2f} s are left until the deadline"
        more = f"Give it more than {self.before_s + self.alone_s:.2f} s"
        if self.alone_s <= self.left_s:
            return MoeServerError(
                f"{left}; prompts that came before take at least {self.before_s:.2f} s, and then "
                f"{takes}.",
                f"Try again later, or on another server. {more}.",
                reason=Reason.EXHAUSTED,
                retry_s=self.before_s,
            )
        fitting = 1 + int((self.left_s - self.prefill_s) / self.token_s) if self.token_s else 0
        shorter = (
            f"ask for at most {fitting} new tokens"
            if self.left_s >= self.prefill_s and fitting >= 1
            else "send a shorter prompt"
        )
        return MoeServerError(f"{left}; {takes}.", f"{more}, or {shorter}.", reason=Reason.EXPIRED)


def hopeless(scheduler: Scheduler, costs: StepCosts, now: float) -> Iterator[Hopeless]:
    """The requests that have not started and cannot finish before their deadline.

    Args:
        scheduler: Not to be changed before the last one was taken.
        costs: What steps take.
        now: `time.monotonic()`.
    """
    if not scheduler.waiting:
        return
    tile, batch = scheduler.tile, scheduler.max_batch_tokens
    before = 0
    coming = {key for sequence in scheduler.running for key in _missing(sequence, scheduler)}
    for sequence in merge(scheduler.running, scheduler.waiting, key=scheduler.rank):
        if sequence.is_running:
            # One that decodes takes its token from every step, but none of them from a prompt.
            before += sequence.num_uncomputed if sequence.num_uncomputed > 1 else 0
            continue
        missing = _missing(sequence, scheduler)
        # A key stands for all blocks before it: behind one that nobody computes none is computed.
        num_coming = sum(1 for _ in takewhile(coming.__contains__, missing))
        num_there = len(sequence.block_keys) - len(missing) + num_coming
        tokens = max(1, len(sequence.token_ids) - num_there * scheduler.block_tokens)
        # What is left of a step behind whole tiles is less than one: it takes short prompts only.
        ahead = before if tokens >= tile else 0
        deadline, is_new = sequence.request.deadline, sequence.cached_tokens is None
        if deadline is not None and is_new:
            both_s = costs.least_prefill_s(ahead + tokens - tokens % tile, batch)
            prefill_s = costs.least_prefill_s(tokens, batch)
            verdict = Hopeless(
                sequence,
                left_s=deadline - now,
                before_s=max(0.0, both_s - prefill_s),
                prefill_s=prefill_s,
                token_s=costs.least_s(1),
            )
            if verdict.before_s + verdict.alone_s > verdict.left_s:
                yield verdict
                continue
        # One that waits for another's blocks can be passed.
        before += 0 if num_coming else tokens
        coming.update(missing)


def _missing(sequence: Sequence, scheduler: Scheduler) -> list[bytes]:
    """The keys of a prompt's blocks from the first one on that is not there."""
    keys = sequence.block_keys
    return keys[len(scheduler.blocks.find(keys)) :]
