"""The warm-up and the proof behind READY: real requests through the real listener.

After the first successful load: requests of all shapes side by side, then probes one after another.
READY means that every probe of one round kept the limits. An engine that takes the place of one
that was proven finds the same machine, and its experts where they were: one probe is enough, unless
that misses a limit.

Knows the protocol and an address; neither the supervisor that awaits it nor the engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import grpc
import structlog

from moe_server.config import WarmupConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2, generation_pb2_grpc
from moe_server.warmup.limits import Limits
from moe_server.warmup.probe import PROBE_TIMEOUT_S, Probe, ProbeShape, send_probe
from moe_server.warmup.stages import PROOF, RECORDED, SHAPES, StageLog

log = structlog.get_logger(__name__)

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
"""Between two tries of a stage."""

RECORDED_AT_ONCE = 4

REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""What a checkpoint cannot do is no failure of the machine."""


class LimitsMissedError(MoeServerError):
    """A round of the proof was too slow."""


@dataclass(frozen=True, slots=True)
class FirstRequests:
    """What is sent before the proof."""

    shapes: Sequence[ProbeShape]
    """Side by side."""
    as_people_send_it: generation_pb2.GenerateStreamRequest | None
    """Beside them."""
    recorded: Sequence[generation_pb2.GenerateStreamRequest] = ()
    """After them."""


class WarmUp:
    """The warm-up of one model; `prove` runs once for every life of its engine.

    Args:
        config: Probes, attempts, and what happens when the limits are missed.
        shape: What every probe asks for.
        first: Sent once.
        target: The server's own listener.
        metadata: Lets its requests in before READY.
        stages: Where its stages are noted.
    """

    def __init__(
        self,
        config: WarmupConfig,
        shape: ProbeShape,
        first: FirstRequests,
        target: str,
        metadata: Sequence[tuple[str, str]],
        stages: StageLog,
    ) -> None:
        self._config = config
        self._shape = shape
        self._first = first
        self._target = target
        self._metadata = metadata
        self._stages = stages
        self.limits = Limits()
        """Of this life's proof."""
        self.probes: list[Probe] = []
        """Every probe of this life, in order; READY rests on the last ones."""
        self.degraded = ""
        """What the last proof that was timed missed, where that is served; otherwise empty."""
        self._has_sent_first = self._was_proven = False
        self._seeds = count()
        """They go on from round to round and from life to life: a prompt seen before would find its
        experts in memory."""

    async def prove(self, limits: Limits, *, is_alone: bool = True) -> None:
        """Returns when every probe of a round kept the limits, or when that is not insisted on.

        Args:
            limits: What a probe may take.
            is_alone: Whether no other requests run. Beside them a probe's time says nothing about
                the machine: it is enough then that it succeeds, and what an earlier proof missed
                stays missed.

        Raises:
            MoeServerError: No round did; the message says what was missed and by how much.
                UNAVAILABLE where the last one failed for a cause that can pass.
        """
        self.limits, self.probes = limits, []
        if is_alone:
            self.degraded = ""
        judged = limits if is_alone else Limits()
        async with self._channel() as channel:
            if not self._has_sent_first:
                if self._first.shapes or self._first.as_people_send_it is not None:
                    await self._stage(SHAPES, lambda _: self._send_shapes(channel))
                if self._first.recorded:
                    await self._stage(RECORDED, lambda _: self._send_recorded(channel))
                self._has_sent_first = True
            try:
                # After a restart a short round comes first, which counts only if it succeeds.
                first = 0 if self._was_proven else 1
                await self._stage(
                    PROOF, lambda attempt: self._round(channel, attempt, judged), first
                )
            except LimitsMissedError as error:
                if self._config.if_missed == "fail":
                    raise
                self.degraded = error.message
                self._stages.doing = "ready, but slower than its limits"
                log.warning(self._stages.doing, missed=error.message)
                return
        if not is_alone:
            self._stages.doing = "its requests succeed; beside others they are not timed"
        self._was_proven = self._was_proven or is_alone

    def _channel(self) -> grpc.aio.Channel:
        # A proxy that the environment names is for the way out, not for our own listener.
        options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
        return grpc.aio.insecure_channel(self._target, options=options)

    async def _stage(
        self, name: str, work: Callable[[int], Awaitable[None]], first: int = 1
    ) -> None:
        """Does `work` until it succeeds, from attempt number `first` to the last one allowed."""
        backoff_s = FIRST_BACKOFF_S
        for attempt in range(first, self._config.attempts + 1):
            self._stages.enter(name)
            try:
                await work(attempt)
            except MoeServerError as error:
                failure = error
            except grpc.aio.AioRpcError as error:
                failure = _failure(error)
            else:
                self._stages.finish()
                return
            self._stages.fail(failure.message)
            log.warning("warm-up failed", stage=name, attempt=attempt, failure=failure.message)
            if 0 < attempt < self._config.attempts:
                self._stages.doing = f"{name} again in {backoff_s:g} s: {failure.message}"
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        attempts = self._config.attempts
        times = "once" if attempts == 1 else f"{attempts} times"
        raise type(failure)(
            f"The {name} failed {times}; last: {failure.message.rstrip('.')}.",
            failure.remedy,
            reason=failure.reason,
        )

    async def _send_shapes(self, channel: grpc.aio.Channel) -> None:
        requests: list[Coroutine[None, None, object]] = [
            send_probe(channel, shape, next(self._seeds), self._metadata)
            for shape in self._first.shapes
        ]
        if self._first.as_people_send_it is not None:
            requests.append(self._send(channel, self._first.as_people_send_it))
        self._stages.doing = f"{len(requests)} requests side by side"
        await _side_by_side(requests)

    async def _send_recorded(self, channel: grpc.aio.Channel) -> None:
        recorded, places = self._first.recorded, asyncio.Semaphore(RECORDED_AT_ONCE)
        num_sent = 0

        async def send(request: generation_pb2.GenerateStreamRequest) -> None:
            nonlocal num_sent
            async with places:
                await self._send(channel, request)
            num_sent += 1
            self._stages.doing = f"{num_sent} of {len(recorded)} recorded requests"

        await _side_by_side([send(request) for request in recorded])

    async def _send(
        self, channel: grpc.aio.Channel, request: generation_pb2.GenerateStreamRequest
    ) -> None:
        """Sends a request; that it is refused is worth a warning."""
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.GenerateStream(request, metadata=self._metadata, timeout=PROBE_TIMEOUT_S)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            if error.code() not in REFUSALS:
                raise
            warning = f"A {request.WhichOneof('prompt')} request is refused: {error.details()}"
            self._stages.warn([warning])
            log.warning("warm-up", found=warning)

    async def _round(self, channel: grpc.aio.Channel, attempt: int, limits: Limits) -> None:
        num_probes = self._config.probes if attempt else 1
        for index in range(1, num_probes + 1):
            self._stages.doing = f"round {attempt}: probe {index} of {num_probes}"
            probe = await send_probe(channel, self._shape, next(self._seeds), self._metadata)
            self.probes.append(probe)
            log.info("probe", attempt=attempt, index=index, ttft_ms=round(1000 * probe.ttft_s, 2))
            missed = limits.missed(probe)
            if missed:
                raise LimitsMissedError(
                    f"probe {index} of {num_probes}: {missed}",
                    "Give more memory (see `moe-server plan`), or raise the limit.",
                    reason=Reason.UNSUPPORTED,
                )
        again = "again by one probe" if attempt == 0 else f"in round {attempt}"
        self._stages.doing = f"proven {again}"


async def _side_by_side(requests: Iterable[Coroutine[None, None, object]]) -> None:
    """Returns when all are done; raises what the first failure is, and ends the others with it."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        # Neither a TaskGroup nor `gather`: cancelled as a request fails, they tell of that alone.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failure(error: grpc.aio.AioRpcError) -> MoeServerError:
    # Also RESOURCE_EXHAUSTED: a proof after a doubt finds requests that run and wait.
    is_passing = error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    return MoeServerError(
        f"a request failed with {error.code().name}: {error.details()}",
        reason=Reason.UNAVAILABLE if is_passing else Reason.UNSUPPORTED,
    )
