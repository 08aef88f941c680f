"""The proof behind READY: real requests through the real listener.

After the first successful load: a batch of requests side by side, then probes one after another,
each timed as a client would time it. READY means that every probe of one round kept the limits. An
engine that takes the place of one that was proven finds the same machine, and its experts where
they were: one probe is enough, unless that misses a limit.

Knows the protocol and an address; neither the supervisor that awaits it nor the engine. `moe-server
warmup` sends the same probes from outside.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import grpc
import structlog

from moe_server.config import WarmupConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2, generation_pb2_grpc
from moe_server.warmup.stages import BATCH, PROOF, StageLog

log = structlog.get_logger(__name__)

PROBE_TIMEOUT_S = 1800.0
"""A first request may read a whole model from a slow disk; longer than this is not serving."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one request took, from the client's side."""

    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    """Time to first token."""
    tpot_s: float
    """Time per output token after the first; 0 where there was only one."""


@dataclass(frozen=True, slots=True)
class ProbeShape:
    """What a probe asks for."""

    model: str
    vocab_size: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def fitting(
        cls,
        prompt_tokens: int,
        new_tokens: int,
        *,
        model: str,
        vocab_size: int,
        max_request_tokens: int,
    ) -> "ProbeShape":
        """Cuts the lengths to what one request may have; the completion goes first."""
        new_tokens = max(1, min(new_tokens, max_request_tokens - 1))
        prompt_tokens = max(1, min(prompt_tokens, max_request_tokens - new_tokens))
        return cls(model, vocab_size, prompt_tokens, new_tokens)

    def prompt(self, seed: int) -> list[int]:
        """Pseudo-random token ids; another seed gives another prompt, so it meets other experts."""
        numbers = random.Random(seed)  # noqa: S311  # no secret: the same in every run
        return numbers.choices(range(self.vocab_size), k=self.prompt_tokens)


async def send_probe(
    channel: grpc.aio.Channel,
    shape: ProbeShape,
    seed: int,
    metadata: Sequence[tuple[str, str]] = (),
    timeout_s: float = PROBE_TIMEOUT_S,
) -> Probe:
    """Generates from `shape.prompt(seed)` and times it.

    Raises:
        grpc.aio.AioRpcError: The request failed.
        MoeServerError: It ended without the tokens that were asked for.
    """
    request = generation_pb2.GenerateStreamRequest(
        model=shape.model,
        token_ids=generation_pb2.TokenIds(ids=shape.prompt(seed)),
        stopping=generation_pb2.Stopping(max_new_tokens=shape.new_tokens, ignore_eos=True),
    )
    stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    num_tokens = 0
    sent = first = last = time.perf_counter()
    async for response in stub.GenerateStream(request, metadata=tuple(metadata), timeout=timeout_s):
        if response.HasField("delta") and response.delta.token_ids:
            last = time.perf_counter()
            first = last if num_tokens == 0 else first
            num_tokens += len(response.delta.token_ids)
    if num_tokens != shape.new_tokens:
        raise MoeServerError(
            f"A probe asked for {shape.new_tokens} tokens and got {num_tokens}.",
            reason=Reason.UNAVAILABLE,
        )
    tpot_s = (last - first) / (num_tokens - 1) if num_tokens > 1 else 0.0
    return Probe(shape.prompt_tokens, num_tokens, first - sent, tpot_s)


def missed_limits(probe: Probe, max_ttft_ms: float | None, max_tpot_ms: float | None) -> str:
    """Which limits a probe missed and by how much; empty where it kept them."""
    measured = (
        ("time to first token", "max_ttft_ms", 1000 * probe.ttft_s, max_ttft_ms),
        ("time per output token", "max_tpot_ms", 1000 * probe.tpot_s, max_tpot_ms),
    )
    return "; ".join(
        f"{what} {took_ms:.1f} ms, {took_ms - limit_ms:.1f} ms over {key} = {limit_ms:g}"
        for what, key, took_ms, limit_ms in measured
        if limit_ms is not None and took_ms > limit_ms
    )


class WarmUp:
    """The warm-up of one model; `prove` runs once for every life of its engine.

    Args:
        config: Sizes, rounds and limits.
        shape: What every request of the warm-up asks for.
        target: The server's own listener.
        batch: Requests sent side by side.
        metadata: Lets its requests in before READY.
        stages: Where its stages are noted.
    """

    def __init__(
        self,
        config: WarmupConfig,
        shape: ProbeShape,
        target: str,
        batch: int,
        metadata: Sequence[tuple[str, str]],
        stages: StageLog,
    ) -> None:
        self._stages = stages
        self._config = config
        self._shape = shape
        self._target = target
        self._batch = batch
        self._metadata = metadata
        self.probes: list[Probe] = []
        """Every probe of this life, in order; READY rests on the last ones."""
        self._was_proven = False
        self._seeds = count()
        """They go on from round to round and from life to life: a prompt seen before would find its
        experts in memory."""

    async def prove(self) -> None:
        """Returns when every probe of a round kept the limits.

        Raises:
            MoeServerError: No round did; the message says what was missed and by how much.
                UNAVAILABLE where the last one failed for a cause that can pass.
        """
        self.probes = []
        failure, reason = "", Reason.UNSUPPORTED
        # A proxy that the environment names is for the way out, not for our own listener.
        options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(self._target, options=options) as channel:
            # After a restart a short round comes first, which counts only if it succeeds.
            for attempt in range(0 if self._was_proven else 1, self._config.attempts + 1):
                reason = Reason.UNSUPPORTED
                try:
                    failure = await self._round(channel, attempt)
                except grpc.aio.AioRpcError as error:
                    failure = f"a request failed with {error.code().name}: {error.details()}"
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        reason = Reason.UNAVAILABLE
                except MoeServerError as error:
                    failure = str(error)
                if not failure:
                    self._stages.finish()
                    self._stages.doing = f"proven in round {attempt}"
                    self._was_proven = True
                    return
                self._stages.fail(failure)
                log.warning("warm-up round failed", attempt=attempt, failure=failure)
        raise MoeServerError(
            f"The warm-up failed {self._config.attempts} times; last: {failure}.",
            "Give more memory (see `moe-server plan`), or raise the limit.",
            reason=reason,
        )

    async def _round(self, channel: grpc.aio.Channel, attempt: int) -> str:
        """What the round's first bad probe missed; empty where all were good."""
        if attempt == 1:
            self._stages.enter(BATCH)
            self._stages.doing = f"warm-up batch of {self._batch}"
            await asyncio.gather(*(self._send(channel) for _ in range(self._batch)))
        num_probes = self._config.probes if attempt else 1
        self._stages.enter(PROOF)
        for index in range(1, num_probes + 1):
            self._stages.doing = f"round {attempt}: probe {index} of {num_probes}"
            probe = await self._send(channel)
            self.probes.append(probe)
            log.info("probe", attempt=attempt, index=index, ttft_ms=round(1000 * probe.ttft_s, 2))
            missed = missed_limits(probe, self._config.max_ttft_ms, self._config.max_tpot_ms)
            if missed:
                return f"probe {index} of {num_probes}: {missed}"
        return ""

    async def _send(self, channel: grpc.aio.Channel) -> Probe:
        return await send_probe(channel, self._shape, next(self._seeds), self._metadata)
