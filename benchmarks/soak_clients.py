"""The clients of the soak: those that behave, and the kinds of those that do not.

Each is one request over gRPC that reports how it ended and what was wrong with that. Knows the
protocol and what it promises; neither the server's inside nor how many there are of whom.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from moe_server.client import STATUS_DETAILS_KEY
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.proto.moe_server.v1 import generation_pb2_grpc

MAX_PROMPT_TOKENS = 96
MAX_NEW_TOKENS = 96
STALLED_NEW_TOKENS = 400
STALL_S = 3.0
GIVE_UP_S = 300.0
"""Nobody waits longer for an answer; one that is given up was lost. A low priority waits for 50 s
more than the others, and all of them where the machine has more to do."""
DEADLINE_SLACK_S = 2.0
"""Of a client that shares its cores with what it measures."""
FIRST_TOKEN_ID = 3
"""Those before it are special."""
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0))
REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


@dataclass(slots=True)
class Ending:
    """How one request ended."""

    kind: str
    started: int = 0
    finished: int = 0
    tokens: int = 0
    counted_tokens: int = 0
    """Those that the server says it generated."""
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""
    has_details: bool = False
    has_retry_info: bool = False
    left: bool = False
    """The client went before the end."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        return not self.started and self.code in REFUSALS


@dataclass(frozen=True, slots=True)
class Target:
    """The server, as clients reach it."""

    address: str
    stub: Any
    vocab_size: int


@asynccontextmanager
async def reached(address: str, vocab_size: int) -> AsyncIterator[Target]:
    """A connection that all clients share but those that need one of their own."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Target(address, generation_pb2_grpc.GenerationServiceStub(channel), vocab_size)  # type: ignore[no-untyped-call]


async def plain(target: Target, rng: random.Random) -> Ending:
    """Reads to the end; sampled or greedy, text or token ids, sometimes constrained."""
    request = _request(target, rng)
    match rng.randrange(6):
        case 0:
            request.ClearField("token_ids")
            request.text = "Once upon a time " * rng.randint(1, 6)
        case 1:
            request.choices.values.extend(["yes", "no", f"number {rng.randrange(1000)}"])
        case 2:
            request.sampling.temperature = 1.0
            request.sampling.num_samples = 2
            request.output.top_logprobs = 3
        case 3:
            request.stopping.stop_sequences.extend(["e", "the"])
    ending = await _read(target.stub, request, "plain")
    return _judged(ending, max(1, request.sampling.num_samples))


async def cancelling(target: Target, rng: random.Random) -> Ending:
    """Cancels: at once, while waiting, or after some tokens."""
    leave_after = rng.choice([0, 1, 5, 20])

    async def leave(call: Any, num_messages: int) -> bool:
        if num_messages >= leave_after:
            call.cancel()
        return num_messages >= leave_after

    return _judged(await _read(target.stub, _request(target, rng), "cancelling", each=leave), 1)


async def hurried(target: Target, rng: random.Random) -> Ending:
    """Has a deadline that it may miss."""
    timeout_s = rng.choice([0.02, 0.1, 0.5, 2.0])
    ending = await _read(target.stub, _request(target, rng), "hurried", timeout_s=timeout_s)
    if ending.seconds > timeout_s + DEADLINE_SLACK_S:
        ending.wrong.append(f"ended {ending.seconds:.1f} s after it began, due in {timeout_s} s")
    return _judged(ending, 1)


async def vanishing(target: Target, rng: random.Random) -> Ending:
    """Its connection breaks without a goodbye."""
    leave_after = rng.choice([1, 2, 8])
    async with _breakable(target.address) as (address, break_all), _own_stub(address) as stub:

        async def leave(_call: Any, num_messages: int) -> bool:
            if num_messages >= leave_after:
                break_all()
            return num_messages >= leave_after

        return _judged(await _read(stub, _request(target, rng), "vanishing", each=leave), 1)


async def stalled(target: Target, rng: random.Random) -> Ending:
    """Reads nothing for a while, then all; every second one leaves instead."""
    request = _request(target, rng)
    request.stopping.max_new_tokens = STALLED_NEW_TOKENS
    request.output.top_logprobs = 20
    leaves = rng.random() < 0.5
    async with _own_stub(target.address) as stub:

        async def stall(call: Any, num_messages: int) -> bool:
            if num_messages == 1:
                await asyncio.sleep(STALL_S * rng.random())
                if leaves:
                    call.cancel()
                    return True
            return False

        return _judged(await _read(stub, request, "stalled", each=stall), 1)


async def wrong(target: Target, rng: random.Random) -> Ending:
    """Sends what cannot be served."""
    request = _request(target, rng)
    expected = grpc.StatusCode.INVALID_ARGUMENT
    match rng.randrange(7):
        case 0:
            request.ClearField("token_ids")
        case 1:
            request.token_ids.ids.append(target.vocab_size)
        case 2:
            request.sampling.temperature = -1.0
        case 3:
            request.model, expected = "nobody", grpc.StatusCode.NOT_FOUND
        case 4:
            request.regex = "("
        case 5:
            request.token_ids.ids.extend([FIRST_TOKEN_ID] * 100_000)
        case 6:
            request.json_schema = '{"type": "nonsense"}'
    ending = await _read(target.stub, request, "wrong")
    if not ending.is_refused and (ending.code, ending.started) != (expected, 0):
        ending.wrong.append(f"ended with {ending.code.name}, expected {expected.name}")
    if not ending.has_details:
        ending.wrong.append(f"{ending.code.name} without details")
    return _judged(ending, 1)


KINDS: dict[Callable[[Target, random.Random], Awaitable[Ending]], float] = {
    plain: 0.5,
    cancelling: 0.15,
    hurried: 0.15,
    vanishing: 0.05,
    stalled: 0.05,
    wrong: 0.1,
}
"""And their shares."""


def _request(target: Target, rng: random.Random) -> pb.GenerateStreamRequest:
    length = rng.randint(1, MAX_PROMPT_TOKENS)
    prompt = rng.choices(range(FIRST_TOKEN_ID, target.vocab_size), k=length)
    if rng.random() < 0.3:  # what many prompts begin with
        prompt[: length // 2] = range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + length // 2)
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stopping=pb.Stopping(max_new_tokens=rng.randint(1, MAX_NEW_TOKENS), ignore_eos=True),
        priority=rng.choice([0, 0, 0, -5, 5]),
    )


async def _read(
    stub: Any,
    request: pb.GenerateStreamRequest,
    kind: str,
    *,
    timeout_s: float | None = None,
    each: Callable[[Any, int], Awaitable[bool]] | None = None,
) -> Ending:
    """Sends one request and reads it to its end, or until `each` says that the client has left."""
    ending, began, num_messages = Ending(kind), time.monotonic(), 0
    call = stub.GenerateStream(request, timeout=timeout_s)
    try:
        async with asyncio.timeout(GIVE_UP_S):
            if each is not None:
                ending.left = await each(call, 0)
            async for message in call:
                num_messages += 1
                _take(ending, message)
                if each is not None and not ending.left:
                    ending.left = await each(call, num_messages)
            ending.code = await call.code()
    except grpc.aio.AioRpcError as error:
        _take_error(ending, error)
    except asyncio.CancelledError:
        if not ending.left:
            raise
        ending.code = grpc.StatusCode.CANCELLED
    except TimeoutError:
        ending.wrong.append(f"no end within {GIVE_UP_S} s")
        ending.left = True
        call.cancel()
    ending.seconds = time.monotonic() - began
    return ending


def _take(ending: Ending, message: pb.GenerateStreamResponse) -> None:
    if message.HasField("started"):
        ending.started += 1
    elif message.HasField("delta"):
        ending.tokens += len(message.delta.token_ids)
    else:
        ending.finished += 1
        ending.counted_tokens += message.finished.usage.completion_tokens
    if not ending.started:
        ending.wrong.append("something came before `started`")


def _take_error(ending: Ending, error: grpc.aio.AioRpcError) -> None:
    ending.code, ending.message = error.code(), error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            details = Status.FromString(value).details
            ending.has_details = bool(details)
            ending.has_retry_info = any(detail.Is(RetryInfo.DESCRIPTOR) for detail in details)


def _judged(ending: Ending, num_samples: int) -> Ending:
    """Adds what no request may do, whoever sent it."""
    code = ending.code
    if ending.started > 1:
        ending.wrong.append(f"started {ending.started} times")
    if code is grpc.StatusCode.OK and not ending.left and ending.finished != num_samples:
        ending.wrong.append(f"OK, but {ending.finished} of {num_samples} samples finished")
    if ending.finished > num_samples:
        ending.wrong.append(f"{ending.finished} ends of {num_samples} samples")
    if code is grpc.StatusCode.OK and ending.tokens > ending.counted_tokens:
        ending.wrong.append(f"{ending.tokens} tokens came, {ending.counted_tokens} were counted")
    if code in REFUSALS and not ending.left and not ending.has_retry_info:
        ending.wrong.append(f"{code.name} without RetryInfo: {ending.message}")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and not ending.left:
        ending.wrong.append(f"{code.name}: {ending.message}")
    return ending


@asynccontextmanager
async def _own_stub(address: str) -> AsyncIterator[Any]:
    """On a connection that nobody else uses, and that buffers little."""
    options = (("grpc.use_local_subchannel_pool", 1), *SMALL_WINDOW)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def _breakable(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to the server that can be cut: its address, and what cuts it."""
    host, _, port = address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []
    pumps: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, there_writer))
        for pump in (_pump(reader, there_writer), _pump(there_reader, writer)):
            pumps.add(asyncio.create_task(pump))

    def break_all() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", break_all
    finally:
        server.close()
        break_all()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
