"""The front door's view of rewarmings: at most one at a time, its news, and its end.

The supervisor delivers what the engine says and never waits. Knows the engine's link, no states.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from moe_server.engine_link import EngineLink
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Rewarm, RewarmProgress, StopRewarm


@dataclass(frozen=True, slots=True)
class _Rewarming:
    """The one that is going on."""

    rewarm_id: int
    link: EngineLink
    news: asyncio.Queue[RewarmProgress | None] = field(default_factory=asyncio.Queue)
    """None in it: the engine was lost."""


class Rewarmings:
    """Those of one model.

    Args:
        name: The model's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._current: _Rewarming | None = None

    async def run(self, link: EngineLink) -> AsyncGenerator[RewarmProgress, None]:
        """As `Supervisor.rewarm` has it.

        Raises:
            MoeServerError: EXHAUSTED, or UNAVAILABLE where the engine is lost.
        """
        if self._current is not None:
            raise MoeServerError(
                f"Model {self._name!r} is being rewarmed already.",
                "Wait until that is done, or stop it.",
                reason=Reason.EXHAUSTED,
            )
        self._count += 1
        rewarming = self._current = _Rewarming(self._count, link)
        link.send(Rewarm(rewarming.rewarm_id))
        try:
            while self._current is rewarming or not rewarming.news.empty():
                progress = await rewarming.news.get()
                if progress is None:
                    raise MoeServerError(
                        f"The engine of model {self._name!r} was lost while it rewarmed.",
                        "The server restarts it: try again when it is ready.",
                        reason=Reason.UNAVAILABLE,
                    )
                yield progress
        finally:
            if self._current is rewarming:
                self.stop()
                self._current = None

    def stop(self) -> None:
        """Asks the engine to end the one that is going on, if there is one."""
        if self._current is not None:
            self._current.link.send(StopRewarm(self._current.rewarm_id))

    def deliver(self, progress: RewarmProgress) -> None:
        """Called with whatever the engine says; what it says of one that was left is dropped."""
        if self._current is not None and progress.rewarm_id == self._current.rewarm_id:
            self._current.news.put_nowait(progress)
            if progress.outcome is not None:
                self._current = None

    def fail(self) -> None:
        """The engine was lost."""
        if self._current is not None:
            self._current.news.put_nowait(None)
            self._current = None
