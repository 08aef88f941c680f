"""Owns the engine process: spawns it, watches it, and starts it again when it is lost.

A life of the engine has four things that can end it: its messages (a Fatal), its exit, its
silence, and a warm-up that failed. Whichever comes first names the loss; every open request fails
with it, and the loss decides between another life and FAILED.

Knows no gRPC and no tokens. The services submit requests through it; what READY has to prove is
given to it as a coroutine function.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import assert_never

import msgspec
import structlog

from moe_server.config import ModelConfig
from moe_server.engine_link import EngineLink, open_link
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import (
    NO_HOT_SET,
    Cancel,
    EngineLoad,
    Fatal,
    HotSet,
    Loaded,
    Progress,
    RewarmProgress,
    StepDone,
    Submit,
    TellHotSet,
    ToEngine,
)
from moe_server.open_requests import OpenRequest, OpenRequests
from moe_server.patience import Patience
from moe_server.rewarmings import Rewarmings
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.warmup.hot_set import HotSetKeeper
from moe_server.warmup.stages import HOT_SET

log = structlog.get_logger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "moe_server.engine_process")
LAST_WORDS_S = 0.5
"""How long a Fatal may still be on its way after the process has ended by itself."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a life of the engine ended."""

    message: str
    remedy: str
    retry: bool
    spares_memory: bool = False
    """Whether what it left in memory is as good as ever: it was killed, and did not fail."""


class Supervisor:
    """The engine's states and the requests it works on.

    Args:
        config: The model's; sent to the engine as its first message.
        prove: Awaited after every successful load; READY follows when it returns. Where it raises
            MoeServerError the model is FAILED until it does; UNAVAILABLE: it stays WARMING.
        command: The engine's command line (`ENGINE_COMMAND` but in tests); the address of its
            socket and the descriptors of memory and pulse are appended.
        patience: How long to wait for what.
        introduction: Messages for each engine after its configuration.
        startup: Where states and stages are told.
        hot_set: Tells engines which experts were wanted, and keeps what they tell; None: nobody is
            told and nothing kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        prove: Callable[[Loaded], Awaitable[None]],
        command: Sequence[str],
        patience: Patience,
        startup: Startup,
        introduction: Sequence[ToEngine] = (),
        hot_set: HotSetKeeper | None = None,
    ) -> None:
        self._hot_set = hot_set
        self._hot_set_told = asyncio.Event()
        self._rewarmings = Rewarmings(config.served_name)
        self.startup = startup
        self._stages = startup.stages
        self._introduction = introduction
        self._config = config
        self._prove = prove
        self._command = command
        self._patience = patience
        limit = config.scheduler.max_running + config.scheduler.max_waiting
        self._max_unread_messages = 8 * limit
        self._requests = OpenRequests(limit)
        self._link: EngineLink | None = None
        self._memory: int | None = None
        """A file in memory where each engine finds the experts that the one before had read."""
        self._phase = ServerState.STARTING
        self._loaded = asyncio.Event()
        self._measured: Loaded | None = None
        self._doubt = asyncio.Event()
        """Something could not be read since the last proof."""
        self._draining = False
        self._is_ending = False
        self._task: asyncio.Task[None] | None = None
        self._is_busy = False
        """Since a request was sent, until the engine says that it has none: the step that it runs
        for one that has left goes on."""
        self._life_ready_at: float | None = None
        self.load = EngineLoad()
        self.num_restarts = 0
        self.tried = asyncio.Event()
        """Set once the first engine has loaded, or was lost before."""

    @property
    def state(self) -> ServerState:
        return self.startup.state

    @property
    def phase(self) -> ServerState:
        """The engine's state, also while the server is DRAINING."""
        return self._phase

    @property
    def num_open_requests(self) -> int:
        return len(self._requests)

    @property
    def is_on_watch(self) -> bool:
        """Whether an engine is started, read and judged here; FAILED for good, none is."""
        is_running = self._task is not None and not self._task.done()
        return is_running or self._phase is ServerState.FAILED

    @property
    def engine_pid(self) -> int | None:
        return self._link.pid if self._link else None

    def start(self, *, draining: bool = False) -> None:
        """Spawns the engine, and respawns it until `stop`; DRAINING if that was asked for."""
        self._draining = draining
        # Without a name: it goes when the last process that holds it ends, however that ends.
        self._memory = os.memfd_create("moe-server-experts")
        self._stages.doing = "starting the engine process"
        self._task = asyncio.create_task(self._run_lives(self._memory), name="supervisor")

    async def stop(self, *, at_once: bool = False) -> None:
        """Ends the engine, in order unless `at_once`; requests that are still open fail."""
        if at_once and self._link is not None:
            self._link.kill()
        self._draining = True
        self._publish()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    @contextmanager
    def admit(self, *, is_probe: bool = False) -> Iterator[OpenRequest]:
        """Holds a place for one request; however the block is left, the engine forgets the request.

        Args:
            is_probe: A request of the warm-up, which comes before READY.

        Raises:
            MoeServerError: UNAVAILABLE in any state but READY, EXHAUSTED where no place is free.
        """
        is_proving = self._phase in (ServerState.WARMING, ServerState.FAILED)
        # Who shuts down waits for requests, not for a proof that nobody needs any more.
        can_prove = is_proving and self._link is not None and not self._is_ending
        is_open = self.state is ServerState.READY or (is_probe and can_prove)
        if not is_open:
            raise MoeServerError(
                f"Model {self._config.served_name!r} is {self.state.value}."
                f"{' ' + self.startup.reason if self.startup.reason else ''}",
                "" if self.state is ServerState.FAILED else "Try again when it is ready.",
                reason=Reason.UNAVAILABLE,
            )
        request = self._requests.open()
        try:
            yield request
        finally:
            if request.submitted and not request.ended and self._link is not None:
                self._link.send(Cancel(request.request_id))
            self._requests.close(request)

    def submit(self, request: OpenRequest, message: Submit) -> None:
        """Hands an admitted request to the engine; its events arrive in `request`."""
        if self._link is None or request.ended:
            return  # The engine was lost since `admit`; iterating over the request says so.
        self._link.send(message)
        request.submitted = True
        self._is_busy = True

    async def drain(self, wait_s: float = 0.0, *, for_good: bool = False) -> int:
        """Refuses new requests; returns how many are still open after `wait_s` at the latest.

        What the engine knows of its experts' use is saved then.

        Args:
            wait_s: How long the open ones may take.
            for_good: The process ends afterwards; `undrain` is refused from now on.
        """
        self._draining = True
        self._is_ending = self._is_ending or for_good
        self._publish()
        if wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._requests.wait_empty()
            except TimeoutError:
                log.info("requests remain after the wait", remaining=len(self._requests))
        await self._save_hot_set()
        return len(self._requests)

    async def rewarm(self) -> AsyncGenerator[RewarmProgress, None]:
        """Has the engine bring back into memory what was wanted most, behind all requests' reads.

        Yields progress about every 0.1 s; the last one has an outcome. Closed before that, or
        cancelled, the rewarming is stopped: close it (`contextlib.aclosing`) if you may leave it.

        Raises:
            MoeServerError: UNAVAILABLE where no engine has loaded or it is lost on the way;
                EXHAUSTED where a rewarming is going on.
        """
        if self._link is None or not self._loaded.is_set():
            raise MoeServerError(
                f"Model {self._config.served_name!r} is {self._phase.value}: nothing can be warm.",
                "Try again when it is ready.",
                reason=Reason.UNAVAILABLE,
            )
        async with aclosing(self._rewarmings.run(self._link)) as news:
            async for progress in news:
                yield progress

    def stop_rewarm(self) -> None:
        """Ends a rewarming that is going on; its last progress says STOPPED."""
        self._rewarmings.stop()

    def undrain(self) -> None:
        """Accepts requests again.

        Raises:
            MoeServerError: The server is shutting down.
        """
        if self._is_ending:
            raise MoeServerError(
                "The server is shutting down.",
                "Start it again, or use another one.",
                reason=Reason.UNAVAILABLE,
            )
        self._draining = False
        self._publish()

    async def _save_hot_set(self) -> None:
        """Asks the engine for its hot set and waits until that is written, though not for ever."""
        if self._hot_set is None or self._link is None or self._life_ready_at is None:
            return
        self._hot_set_told.clear()
        self._link.send(TellHotSet())
        try:
            async with asyncio.timeout(self._patience.shutdown_s):
                await self._hot_set_told.wait()
                await self._hot_set.saved()
        except TimeoutError:
            log.warning("the engine is busy: its hot set stays as it was saved last")

    async def _give_hot_set(self) -> None:
        """The engine gets what is wanted most, which the warm-up's random prompts have displaced.

        At a start it is back in memory when this returns: the first requests would meet the disk.
        After a restart those who were cut off wait already, and it comes back behind them.
        """
        if self._hot_set is None or self._link is None:
            return
        hot_set = await self._hot_set.latest()
        self._link.send(hot_set)
        if self.num_restarts or not any(hot_set.visits):
            return
        proven = self._stages.doing
        self._stages.enter(HOT_SET)
        # An operator's rewarming does the same; where the engine is lost, its life is over.
        with suppress(MoeServerError):
            async with aclosing(self._rewarmings.run(self._link)) as news:
                async for progress in news:
                    self._stages.enter(HOT_SET, progress.bytes_done, progress.bytes_total)
        self._stages.finish()
        self._stages.doing = proven

    def _enter(self, phase: ServerState) -> None:
        if phase is not self._phase:
            log.info("state", state=phase.value, engine_pid=self.engine_pid)
        self._phase = phase
        self._publish()

    def _publish(self) -> None:
        hides_phase = self._draining and self._phase is not ServerState.FAILED
        self.startup.feed.publish(ServerState.DRAINING if hides_phase else self._phase)

    async def _run_lives(self, memory: int) -> None:
        backoff_s = self._patience.first_backoff_s
        while True:
            try:
                loss = await self._run_life(memory)
            except OSError as error:
                loss = Loss(f"The engine process cannot be started: {error}.", "", retry=True)
            except Exception as error:
                log.exception("engine life ended unexpectedly")
                loss = Loss(f"Unexpected {error!r}.", "See the log.", retry=True)
            self.tried.set()
            if self._life_ready_at is None or not loss.spares_memory:
                # It may be what it found there that ended it, or it may have written where it
                # should not; and memory is needed by others while no engine can run.
                await asyncio.to_thread(os.ftruncate, memory, 0)
            self._stages.fail(loss.message)
            log.error("engine lost", message=loss.message, remedy=loss.remedy, retry=loss.retry)
            if self._is_ending:
                return  # Its requests have failed, and nobody needs another engine.
            if not loss.retry:
                self.startup.reason = f"{loss.message} {loss.remedy}".strip()
                self._enter(ServerState.FAILED)
                return
            if self._was_steady():
                backoff_s = self._patience.first_backoff_s
            self._stages.doing = f"restarting the engine in {backoff_s:g} s: {loss.message}"
            self._enter(ServerState.STARTING)
            await asyncio.sleep(backoff_s)
            self.num_restarts += 1
            backoff_s = min(2 * backoff_s, self._patience.longest_backoff_s)

    def _was_steady(self) -> bool:
        ready_at = self._life_ready_at
        return ready_at is not None and time.monotonic() - ready_at > self._patience.steady_s

    async def _run_life(self, memory: int) -> Loss:
        self._loaded.clear()
        self._life_ready_at = None
        self._is_busy = False
        self.load = EngineLoad()
        failure = ("The server is shutting down.", "Retry on another server.")
        async with open_link(
            self._command,
            memory,
            max_unread_messages=self._max_unread_messages,
            shutdown_s=self._patience.shutdown_s,
        ) as link:
            self._link = link
            try:
                loss = await self._await_loss(link)
                remedy = "Retry; the server restarts it." if loss.retry else ""
                failure = (f"The engine was lost: {loss.message}", remedy)
                return loss
            finally:
                self._link = None
                if not self._loaded.is_set():
                    # It has no requests, and reads no Shutdown before it has loaded.
                    link.kill()
                # Before the engine's orderly end, which can take seconds: nobody waits for it.
                self.startup.reason = ""
                self._phase = ServerState.STARTING
                self._publish()
                self._requests.fail_all(*failure)
                self._rewarmings.fail()

    async def _await_loss(self, link: EngineLink) -> Loss:
        reader = asyncio.create_task(self._read(link), name="engine reader")
        endings = [
            reader,
            asyncio.create_task(self._await_exit(link, reader), name="engine exit"),
            asyncio.create_task(self._await_silence(link), name="engine watchdog"),
            asyncio.create_task(self._warm_up(), name="warm-up"),
        ]
        try:
            done, _ = await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            return reader.result() if reader in done else done.pop().result()
        finally:
            for task in endings:
                task.cancel()
            await asyncio.gather(*endings, return_exceptions=True)

    async def _read(self, link: EngineLink) -> Loss:
        await link.send_config(self._config.model_dump_json().encode())
        link.send(NO_HOT_SET if self._hot_set is None else await self._hot_set.latest())
        for introduction in self._introduction:
            link.send(introduction)
        while True:
            try:
                message = await link.receive()
            except msgspec.DecodeError as error:
                return Loss(f"The engine sent something unreadable: {error}.", "", retry=True)
            if isinstance(message, Fatal):
                return Loss(message.message, message.remedy, message.retry)
            self._take(link, message)

    def _take(
        self, link: EngineLink, message: StepDone | Progress | Loaded | HotSet | RewarmProgress
    ) -> None:
        match message:
            case StepDone():
                self._take_step(link, message)
            case Progress():
                self._note_progress(message)
            case Loaded():
                log.info(
                    "engine loaded",
                    seconds=round(message.seconds, 2),
                    experts_kept=message.num_kept,
                    experts_outlast_engine=message.outlasts_engine,
                )
                self._measured = message
                self._loaded.set()
                self.tried.set()
            case HotSet():
                if self._hot_set is not None and self._life_ready_at is not None:
                    self._hot_set.keep(message)
                self._hot_set_told.set()
            case RewarmProgress():
                self._rewarmings.deliver(message)
            case _:
                assert_never(message)

    def _take_step(self, link: EngineLink, done: StepDone) -> None:
        if done.load.offload.read_failures > self.load.offload.read_failures:
            self._doubt.set()
        self.load = done.load
        if not (done.load.running or done.load.waiting or self._requests.num_pending):
            self._is_busy = False
        for event in done.tokens:
            if not self._requests.deliver(event):
                link.send(Cancel(event.request_id))
        for failure in done.failed:
            self._requests.fail(failure)

    def _note_progress(self, progress: Progress) -> None:
        if self._loaded.is_set():
            return
        if progress.stage != self._stages.doing:
            log.info("loading", stage=progress.stage, bytes_total=progress.bytes_total)
        self._stages.enter(progress.stage, progress.bytes_done, progress.bytes_total)
        self._enter(ServerState.LOADING)

    async def _await_exit(self, link: EngineLink, reader: asyncio.Task[Loss]) -> Loss:
        ending = await link.wait_exit()
        if not ending.by_signal:
            await asyncio.wait({reader}, timeout=LAST_WORDS_S)
        if reader.done():
            return reader.result()
        remedy = "" if ending.by_signal else "See the log above."
        message = f"The engine process ended with {ending}."
        return Loss(message, remedy, retry=True, spares_memory=ending.was_killed)

    async def _await_silence(self, link: EngineLink) -> Loss:
        was_overdue = False
        while True:
            await asyncio.sleep(min(self._patience.idle_s, self._patience.pulse_s) / 8)
            message = self._overdue(link)
            # Twice in a row: after this process itself was stopped, what the engine said meanwhile
            # must be read before its silence is judged.
            if message and was_overdue:
                link.kill()
                return Loss(message, "", retry=True, spares_memory=True)
            was_overdue = bool(message)

    def _overdue(self, link: EngineLink) -> str:
        """What the engine owes us; empty if nothing."""
        if link.lifeless_s > self._allowed_lifeless_s():
            return f"The engine process has stood still for {link.lifeless_s:.0f} s."
        if link.silent_s > self._allowed_silence_s():
            return f"The engine said nothing and read nothing for {link.silent_s:.0f} s."
        return ""

    def _allowed_lifeless_s(self) -> float:
        is_loading = self._phase in (ServerState.STARTING, ServerState.LOADING)
        return self._patience.loading_pulse_s if is_loading else self._patience.pulse_s

    def _allowed_silence_s(self) -> float:
        if self._phase is ServerState.STARTING:
            return self._patience.first_message_s
        if self._phase is ServerState.LOADING:
            return self._patience.loading_s
        return self._patience.busy_s if self._is_busy else self._patience.idle_s

    async def _warm_up(self) -> Loss:
        """Proves, and proves again whenever there is doubt; ends with the engine's life."""
        await self._loaded.wait()
        assert self._measured is not None
        self._enter(ServerState.WARMING)
        while True:
            try:
                await self._prove(self._measured)
            except MoeServerError as error:
                log.error("not proven", reason=str(error))  # noqa: TRY400  # no surprise
                again_s = self._patience.proof_again_s
                self._stages.doing = f"proving anew in {again_s:g} s: {error}"
                if error.reason is not Reason.UNAVAILABLE:
                    self.startup.reason = str(error)
                    self._enter(ServerState.FAILED)
                await asyncio.sleep(again_s)
                continue
            self._doubt.clear()  # The rounds that failed have set it.
            self.startup.reason = ""
            if self._life_ready_at is None:
                # Not after a later proof: what was learned since the last save would be lost.
                await self._give_hot_set()
                self._life_ready_at = time.monotonic()
            self._stages.note_ready()
            self._enter(ServerState.READY)
            await self._doubt.wait()
            log.warning("a read failed: proving anew", failures=self.load.offload.read_failures)
            self._enter(ServerState.WARMING)
