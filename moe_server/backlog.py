"""Which waiting requests are refused for their wait: the queue is bounded in time.

A queue that is bounded in its length only grows under overload, until whoever has a short deadline
cannot make it and what was begun for the others ends too late as well. So nobody waits for longer
than `scheduler.max_wait_s`, or than the own deadline allows. Whom the requests in front will keep
for longer, at the pace at which requests start here, is told so at once. Who has started, or
follows others of the same call, is never refused here. The engine asks when it has planned a step:
whoever can start has started.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe_server.errors import MoeServerError, Reason
from moe_server.scheduler import Scheduler
from moe_server.sequence import Sequence

MEMORY_S = 30.0
"""Of the pace: what is older counts less than 1/e of what is new, and after some minutes in which
nobody waited nothing is known."""
ENOUGH_S = 2.0
"""Seconds in which requests waited, before anything is said of the pace."""
PATIENCE_STEPS = 2
"""As long as so many steps take a request may always wait: a disk can make one take seconds, and
who comes while it runs has not been passed over."""
LONGEST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that waits for too long, or would."""

    sequence: Sequence
    waited_s: float
    in_front_s: float
    """What it would still wait for the requests in front."""
    limit_s: float
    queue_s: float
    """Until everybody who waits now has started: when to come again."""

    def error(self) -> MoeServerError:
        """Why it is refused, and when to come again."""
        why = f"It waited for {self.waited_s:.1f} s"
        if self.in_front_s:
            why += f" and requests in front would keep it for {self.in_front_s:.1f} s more"
        return MoeServerError(
            f"{why}; it may wait for {self.limit_s:.1f} s.",
            "Try again later, or on another server. To let requests wait for longer, raise "
            "scheduler.max_wait_s.",
            reason=Reason.EXHAUSTED,
            retry_s=min(self.queue_s, LONGEST_RETRY_S),
        )


class Backlog:
    """How fast the queue moves, and who has to leave it.

    Args:
        max_wait_s: Seconds that a request may wait; 0: as long as its deadline allows.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s or math.inf
        # Of the time in which requests waited: only then they start as fast as they can.
        self._seconds = self._tokens = 0.0
        self._some_waited = False
        self._looked_at = self._step_s = 0.0
        self._started_tokens = 0

    def observe(self, scheduler: Scheduler, now: float) -> None:
        """Learns the pace; to be called after every `schedule`.

        Args:
            scheduler: Always the same.
            now: `time.monotonic()`.
        """
        started_tokens = scheduler.counters.started_tokens
        elapsed = now - self._looked_at
        kept = math.exp(-elapsed / MEMORY_S)
        self._seconds *= kept
        self._tokens *= kept
        if self._some_waited:
            self._step_s = elapsed
            self._seconds += elapsed
            self._tokens += started_tokens - self._started_tokens
        self._some_waited = bool(scheduler.waiting)
        self._looked_at, self._started_tokens = now, started_tokens

    def seconds_of(self, num_tokens: int) -> float:
        """How long it takes until waiting requests of `num_tokens` have started; 0: unknown."""
        if self._seconds < ENOUGH_S or not self._tokens:
            return 0.0
        return num_tokens * self._seconds / self._tokens

    def refused(self, scheduler: Scheduler, now: float) -> Iterator[Refused]:
        """Who waits for too long, or would.

        Args:
            scheduler: Not to be changed before the last one was taken.
            now: `time.monotonic()`.
        """
        waiting = scheduler.waiting
        queue_s = self.seconds_of(sum(len(sequence.token_ids) for sequence in waiting))
        in_front = 0
        for sequence in waiting:
            if sequence.cached_tokens is None and not sequence.request.is_patient:
                limit_s = self._limit_s(sequence)
                waited_s, in_front_s = now - sequence.arrived, self.seconds_of(in_front)
                if waited_s >= limit_s or waited_s + in_front_s > limit_s:
                    yield Refused(sequence, waited_s, in_front_s, limit_s, queue_s or limit_s)
                    continue
            in_front += len(sequence.token_ids)

    def _limit_s(self, sequence: Sequence) -> float:
        deadline = sequence.request.deadline
        in_time_s = math.inf if deadline is None else deadline - sequence.arrived
        return min(max(self._max_wait_s, PATIENCE_STEPS * self._step_s), in_time_s)
