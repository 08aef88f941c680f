"""A server of our own for a benchmark, and requests whose tokens are timed.

Speaks gRPC as any client does. Knows neither the hardware nor what is compared.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_server import running_server, wait_ready
from moe_server.client import Client
from moe_server.proto.moe_server.v1 import generation_pb2 as pb


@contextmanager
def ready_server(
    model: Path, flags: Sequence[str], port: int, timeout_s: float, log: Path
) -> Iterator[Client]:
    """Starts `moe-server serve` and waits until it is READY; ends it afterwards."""
    address = f"127.0.0.1:{port}"
    with running_server(str(model), flags, address, log) as process, Client(address) as client:
        wait_ready(client, process, log, timeout_s=timeout_s)
        yield client


@dataclass(frozen=True, slots=True)
class Timed:
    """One request: seconds since it was sent, of each token."""

    arrivals_s: tuple[float, ...]
    finished: pb.Finished

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.arrivals_s) - 1) / (self.arrivals_s[-1] - self.arrivals_s[0])


def random_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """Token ids."""
    return random.Random(seed).choices(range(vocab_size), k=num_tokens)  # noqa: S311


def timed_request(client: Client, prompt: Sequence[int], new_tokens: int) -> Timed:
    """Generates exactly `new_tokens`, greedily."""
    arrivals: list[float] = []
    finished = pb.Finished()
    stopping = pb.Stopping(max_new_tokens=new_tokens, ignore_eos=True)
    sent = time.perf_counter()
    for event in client.generate_stream(list(prompt), stopping=stopping):
        if event.HasField("delta"):
            # Tokens that came together were merged on the way.
            now = time.perf_counter() - sent
            arrivals += [now] * max(1, len(event.delta.token_ids))
        elif event.HasField("finished"):
            finished = event.finished
    return Timed(tuple(arrivals), finished)


def side_by_side(
    client: Client, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[Timed], float]:
    """All requests at once.

    Returns:
        The requests, and the tokens per second of all together while all of them decoded.
    """
    with ThreadPoolExecutor(len(prompts)) as threads:
        started = time.perf_counter()

        def send(prompt: Sequence[int]) -> tuple[float, Timed]:
            return time.perf_counter() - started, timed_request(client, prompt, new_tokens)

        sent, timed = zip(*threads.map(send, prompts), strict=True)
    first = max(begin + one.arrivals_s[0] for begin, one in zip(sent, timed, strict=True))
    last = min(begin + one.arrivals_s[-1] for begin, one in zip(sent, timed, strict=True))
    tokens = sum(
        first < begin + arrival <= last
        for begin, one in zip(sent, timed, strict=True)
        for arrival in one.arrivals_s
    )
    return list(timed), tokens / (last - first) if last > first else 0.0
