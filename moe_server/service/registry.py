"""The models of a running server: found by name, started, drained and ended together.

Every model has its own engine, state and bounds; one that fails leaves the others serving. What
they share is the machine: their first warm-ups take turns, so that none is measured while another
one loads. Until the checkpoints of all can be read there are names and states only.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence

import structlog

from moe_server.errors import MoeServerError, Reason
from moe_server.messages import Loaded
from moe_server.service.errors import NotFoundError
from moe_server.service.running_model import ModelSetup, RunningModel
from moe_server.startup import Startup
from moe_server.state import ServerState, joint_feed

log = structlog.get_logger(__name__)


class Registry:
    """All models, in the order of the configuration. `start` them when they have been read.

    Args:
        startups: Of at least one model; all names differ.
        target: As in RunningModel.
        probe_metadata: As in RunningModel.
    """

    def __init__(
        self,
        startups: Sequence[Startup],
        target: str,
        probe_metadata: Sequence[tuple[str, str]],
    ) -> None:
        self._target = target
        self._probe_metadata = probe_metadata
        self._startups = {startup.name: startup for startup in startups}
        self._models: dict[str, RunningModel] = {}
        self._turn = asyncio.Lock()
        self._began = time.monotonic()
        self._draining = False
        self.feed = joint_feed([startup.feed for startup in self.startups])
        """The server's state: that of the least ready model."""

    def start(self, setups: Sequence[ModelSetup]) -> None:
        """Spawns every model's engine; the setups are in the order of the names."""
        assert [setup.model.name for setup in setups] == list(self._startups)
        self._models = {
            setup.model.name: RunningModel(
                setup,
                self._startups[setup.model.name],
                self._target,
                self._probe_metadata,
                self._prove,
                names_log_lines=len(setups) > 1,
            )
            for setup in setups
        }
        for running in self:
            running.start(draining=self._draining)

    def __iter__(self) -> Iterator[RunningModel]:
        """None before `start`."""
        return iter(self._models.values())

    @property
    def startups(self) -> list[Startup]:
        """Of all models, at any time."""
        return list(self._startups.values())

    @property
    def least_ready(self) -> Startup:
        """Of the model that the server's state is that of; the first one of several."""
        return next(one for one in self.startups if one.state is self.feed.current)

    @property
    def reason(self) -> str:
        """FAILED: what happened and what to do, of every model that did. Otherwise empty."""
        reasons = {startup.name: startup.reason for startup in self.startups}
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        return " ".join(f"Model {name!r}: {reason}" for name, reason in reasons.items() if reason)

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._began

    def find_startup(self, name: str) -> Startup:
        """That of a model; of the first one where the name is empty.

        Raises:
            NotFoundError: There is no such model; it says which there are.
        """
        try:
            return self._startups[name] if name else self.startups[0]
        except KeyError:
            there = ", ".join(map(repr, self._startups))
            raise NotFoundError("model", name, f"This server has {there}.", field="model") from None

    def find(self, name: str) -> RunningModel:
        """The model of that name; the first one where it is empty.

        Raises:
            NotFoundError: There is none; it says which there are.
            MoeServerError: UNAVAILABLE, its checkpoint is waited for.
        """
        startup = self.find_startup(name)
        self.refuse_unread()
        return self._models[startup.name]

    def running(self, startup: Startup) -> RunningModel | None:
        """The model of that start; None before `start`."""
        return self._models.get(startup.name)

    def refuse_unread(self) -> None:
        """Refuses what can be told only when the checkpoints have been read.

        Raises:
            MoeServerError: UNAVAILABLE, with what is waited for.
        """
        if not self._models:
            raise MoeServerError(
                f"No checkpoint has been read yet: {self.startups[0].stages.doing}",
                "Try again later.",
                reason=Reason.UNAVAILABLE,
            )

    async def drain(self, wait_s: float = 0.0, *, for_good: bool = False) -> int:
        """Refuses new requests; returns how many are still open after `wait_s` at the latest."""
        self._drain_unread(draining=True)
        drains = (running.drain(wait_s, for_good=for_good) for running in self)
        return sum(await asyncio.gather(*drains))

    def undrain(self) -> None:
        """Accepts requests again.

        Raises:
            MoeServerError: The server is shutting down.
        """
        self._drain_unread(draining=False)
        for running in self:
            running.supervisor.undrain()

    async def close(self, *, at_once: bool = False) -> None:
        """Ends all engines, in order unless `at_once`; requests that are still open fail."""
        await asyncio.gather(*(running.close(at_once=at_once) for running in self))

    def _drain_unread(self, *, draining: bool) -> None:
        """While there are no supervisors to tell."""
        self._draining = draining
        if not self._models:
            for startup in self.startups:
                startup.feed.publish(ServerState.DRAINING if draining else ServerState.STARTING)

    async def _prove(self, running: RunningModel, loaded: Loaded) -> None:
        running.startup.stages.doing = "waiting for other models to load or warm up"
        others = (other.supervisor.tried for other in self if other is not running)
        await asyncio.gather(*(tried.wait() for tried in others))
        async with self._turn:
            is_alone = running.supervisor.num_open_requests == 0
            await running.warm_up.prove(running.limits(loaded), is_alone=is_alone)
