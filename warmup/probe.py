"""One request through a real listener, timed as its client would time it.

The warm-up behind READY consists of them, and `moe-server warmup` sends the same from outside.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2, generation_pb2_grpc

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
    max_request_tokens: int

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
        return cls(model, vocab_size, prompt_tokens, new_tokens, max_request_tokens)

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
