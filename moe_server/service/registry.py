"""The models of a running server: found by name, started, drained and ended together.

Every model has its own engine, state and bounds; one that fails leaves the others serving. What
they share is the machine: their first warm-ups take turns, so that none is measured while another
one loads.
"""

import asyncio
from collections.abc import Iterator, Sequence

import structlog

from moe_server.service.errors import NotFoundError
from moe_server.service.running_model import ModelSetup, RunningModel
from moe_server.state import joint_feed

log = structlog.get_logger(__name__)


class Registry:
    """All models, in the order of the configuration.

    Args:
        setups: At least one; names differ.
        target: As in RunningModel.
        probe_metadata: As in RunningModel.
    """

    def __init__(
        self,
        setups: Sequence[ModelSetup],
        target: str,
        probe_metadata: Sequence[tuple[str, str]],
    ) -> None:
        self._models = {
            setup.model.name: RunningModel(
                setup, target, probe_metadata, self._prove, names_log_lines=len(setups) > 1
            )
            for setup in setups
        }
        assert len(self._models) == len(setups), "the configuration refuses equal names"
        self._turn = asyncio.Lock()
        self.feed = joint_feed([running.supervisor.feed for running in self])
        """The server's state: that of the least ready model."""

    def __iter__(self) -> Iterator[RunningModel]:
        return iter(self._models.values())

    @property
    def first(self) -> RunningModel:
        """The one that requests without a name mean."""
        return next(iter(self))

    @property
    def least_ready(self) -> RunningModel:
        """The model that the server's state is that of; the first one of several."""
        return next(one for one in self if one.supervisor.state is self.feed.current)

    @property
    def reason(self) -> str:
        """FAILED: what happened and what to do, of every model that did. Otherwise empty."""
        reasons = {running.name: running.supervisor.reason for running in self}
        if len(reasons) == 1:
            return self.first.supervisor.reason
        return " ".join(f"Model {name!r}: {reason}" for name, reason in reasons.items() if reason)

    def find(self, name: str) -> RunningModel:
        """The model of that name; the first one where it is empty.

        Raises:
            NotFoundError: There is none; it says which there are.
        """
        if not name:
            return self.first
        try:
            return self._models[name]
        except KeyError:
            there = ", ".join(repr(running.name) for running in self)
            raise NotFoundError("model", name, f"This server has {there}.", field="model") from None

    def start(self) -> None:
        """Spawns every model's engine."""
        for running in self:
            running.start()

    async def drain(self, wait_s: float = 0.0, *, for_good: bool = False) -> int:
        """Refuses new requests; returns how many are still open after `wait_s` at the latest."""
        drains = (running.drain(wait_s, for_good=for_good) for running in self)
        return sum(await asyncio.gather(*drains))

    def undrain(self) -> None:
        """Accepts requests again.

        Raises:
            MoeServerError: The server is shutting down.
        """
        for running in self:
            running.supervisor.undrain()

    async def close(self, *, at_once: bool = False) -> None:
        """Ends all engines, in order unless `at_once`; requests that are still open fail."""
        await asyncio.gather(*(running.close(at_once=at_once) for running in self))

    async def _prove(self, running: RunningModel) -> None:
        running.warm_up.stage = "waiting for other models to load or warm up"
        others = (other.supervisor.tried for other in self if other is not running)
        await asyncio.gather(*(tried.wait() for tried in others))
        async with self._turn:
            await running.warm_up.prove()
