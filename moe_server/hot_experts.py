"""The engine's part in the hot set: tells how often experts were wanted, and rewarms.

`engine` passes on what it is asked for and calls `between_steps`. Knows messages, no requests.
"""

import time

from moe_server.budget import MemoryPlan
from moe_server.messages import HotSet, Rewarm, RewarmOutcome, RewarmProgress, StopRewarm
from moe_server.offload.refill import Refill
from moe_server.weights import Weights

PROGRESS_EVERY_S = 0.1


class HotExperts:
    """What happens to the hot set between steps.

    Args:
        weights: Where experts are, and how often they were wanted.
        plan: How many places there are for them.
        tell_every_s: How often the hot set is told without being asked for, if there is news.
    """

    def __init__(self, weights: Weights, plan: MemoryPlan, tell_every_s: float) -> None:
        self._weights = weights
        self._plan = plan
        self._tell_every_s = tell_every_s
        self._told_at, self._num_told, self._is_asked = time.monotonic(), 0, False
        self._rewarm: tuple[int | None, Refill] | None = None
        """Its id; None: nobody is told."""
        self._progress_at = 0.0
        self._unsent: list[RewarmProgress] = []

    @property
    def is_rewarming(self) -> bool:
        return self._rewarm is not None

    def ask(self) -> None:
        """The hot set is told after the step."""
        self._is_asked = True

    def begin(self, hot_set: HotSet) -> None:
        """What was wanted since the start was the warm-up's, and is not what requests will want.

        It is not counted, and what it has displaced comes back.
        """
        self._weights.uses.restore(hot_set.visits, hot_set.shares)
        if any(hot_set.visits):
            self._refill(None)

    def rewarm(self, message: Rewarm) -> None:
        """Begins to bring back what was wanted most."""
        self._refill(message.rewarm_id)

    def stop(self, message: StopRewarm) -> None:
        """Ends a rewarming; none where it is another one that is going on."""
        if self._rewarm is not None and self._rewarm[0] == message.rewarm_id:
            self._rewarm[1].stop()
            self._end(RewarmOutcome.STOPPED)

    def between_steps(self) -> list[HotSet | RewarmProgress]:
        """Goes on with the rewarming; returns what is to be told."""
        if self._rewarm is not None:
            self._go_on(*self._rewarm)
        news: list[HotSet | RewarmProgress] = [*self._unsent]
        self._unsent.clear()
        uses, now = self._weights.uses, time.monotonic()
        is_due = now - self._told_at >= self._tell_every_s and uses.num_noted > self._num_told
        if is_due or self._is_asked:
            self._told_at, self._num_told, self._is_asked = now, uses.num_noted, False
            news.append(HotSet(uses.visits(), uses.shares()))
        return news

    def _refill(self, rewarm_id: int | None) -> None:
        if self._rewarm is not None:
            self._rewarm[1].stop()
            self._end(RewarmOutcome.STOPPED)
        uses, cache = self._weights.uses, self._weights.cache
        hot = uses.ranked()[: self._plan.num_places]
        self._rewarm = rewarm_id, Refill(cache, uses, hot, self._plan.slot_bytes)

    def _go_on(self, rewarm_id: int | None, refill: Refill) -> None:
        refill.advance()
        now = time.monotonic()
        if refill.is_done:
            self._end(RewarmOutcome.DONE)
        elif now - self._progress_at >= PROGRESS_EVERY_S:
            self._progress_at = now
            self._tell(rewarm_id, refill, None)

    def _end(self, outcome: RewarmOutcome) -> None:
        assert self._rewarm is not None
        self._tell(*self._rewarm, outcome)
        self._rewarm = None

    def _tell(self, rewarm_id: int | None, refill: Refill, outcome: RewarmOutcome | None) -> None:
        if rewarm_id is None:
            return
        progress = RewarmProgress(
            rewarm_id,
            refill.num_done,
            refill.num_total,
            refill.num_left_out,
            refill.num_done * self._plan.slot_bytes,
            refill.num_total * self._plan.slot_bytes,
            outcome,
        )
        self._unsent.append(progress)
