"""How much sooner a server that starts with a hot set finds its experts where they are wanted.

Traffic in which few topics are most of it: a topic is one token, as random weights route by the
token, and topics are drawn with Zipf's weights. Half of the experts have a place. A first server
serves it until its cache has settled, saves its hot set at a drain, and goes on. Then, for each of
several sequences of requests, it and two servers that have just started get the same ones: one
started without that file, one with it. Which experts a request wants depends on nothing else, so
hits are compared request by request: what counts is how many experts were wanted until a server's
hits over the next window are as many as the settled one's in the same place.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.coldstart_ready import CAPPED, started
from moe_server.client import Client
from moe_server.config import known_keys
from moe_server.proto.moe_server.v1 import generation_pb2

KEY = "warmup.hot_set"
"""A file that is read at the start and written at the end, or \"off\"."""
NUM_TOPICS = 12
ZIPF = 2.0
"""The commonest topic is 64 % of the traffic, the first three 87 %."""
PROMPT_TOKENS = 8
LEARNED_REQUESTS = 100
WINDOW_SLOTS = 2
"""Experts wanted within a window, in slots of the server."""
NEAR = 0.95
"""Of the settled server's hits: as good as settled."""
NO_REUSE = {"MOE_SERVER_SCHEDULER__REUSE_PREFIXES": "false"}
"""Whatever is sent twice is to be computed twice."""


@dataclass(frozen=True)
class Looked:
    """Of one request: wanted experts that were in memory, and that had to come from disk."""

    found: int
    missing: int

    @property
    def wanted(self) -> int:
        return self.found + self.missing


@dataclass(frozen=True)
class Pair:
    """One sequence of requests to three servers."""

    window: int
    """In wanted experts."""
    settled: list[Looked]
    without: list[Looked]
    with_: list[Looked]

    @property
    def wanted_without(self) -> int:
        return until_settled(self.without, self.settled, self.window)

    @property
    def wanted_with(self) -> int:
        return until_settled(self.with_, self.settled, self.window)

    @property
    def speedup(self) -> float:
        """How many times sooner the settled server's hit rate was there."""
        return self.wanted_without / self.wanted_with


@dataclass(frozen=True)
class HotSet:
    """What all sequences have shown; medians over them."""

    pairs: list[Pair]
    uniform_rate: float
    """Of requests without topics, which no cache can serve better."""

    @property
    def settled_rate(self) -> float:
        return hit_rate([looked for pair in self.pairs for looked in pair.settled])

    @property
    def wanted_without(self) -> float:
        return statistics.median(pair.wanted_without for pair in self.pairs)

    @property
    def wanted_with(self) -> float:
        return statistics.median(pair.wanted_with for pair in self.pairs)

    @property
    def speedup(self) -> float:
        return statistics.median(pair.speedup for pair in self.pairs)


def hit_rate(looked: Sequence[Looked]) -> float:
    """Of wanted experts, how many were in memory."""
    return sum(one.found for one in looked) / sum(one.wanted for one in looked)


def until_settled(own: Sequence[Looked], settled: Sequence[Looked], window: int) -> int:
    """How many experts were wanted up to the first request from which on a window is good.

    That request's are counted in: it is the finest that can be seen, and a cache that is right at
    once is right with it. All of them where no window is good.
    """
    wanted = 0
    for first in range(len(own)):
        wanted += own[first].wanted
        end, in_window = first, 0
        while end < len(own) and in_window < window:
            in_window += own[end].wanted
            end += 1
        found, goal = (sum(one.found for one in them[first:end]) for them in (own, settled))
        if in_window >= window and found >= NEAR * goal:
            break
    return wanted


def topics(seed: str, num_requests: int) -> list[list[int]]:
    """Prompts of skewed traffic; which topic is the common one is the same for every seed."""
    tokens = random.Random("topics").sample(range(3, 8000), NUM_TOPICS)  # noqa: S311
    weights = [rank**-ZIPF for rank in range(1, NUM_TOPICS + 1)]
    drawn = random.Random(seed).choices(tokens, weights, k=num_requests)  # noqa: S311
    return [[token] * PROMPT_TOKENS for token in drawn]


def is_available() -> bool:
    """Whether this checkout's server knows hot sets."""
    return KEY in known_keys()


def measure(model: Path, folder: Path, num_sequences: int, num_requests: int) -> HotSet:
    """A server that goes on, and two for each sequence. Needs root.

    Args:
        model: A checkpoint.
        folder: For logs, sockets and the hot set.
        num_sequences: Of requests, each with servers of its own.
        num_requests: In each.
    """
    file = folder / "coldstart.hotset"
    file.unlink(missing_ok=True)
    sequences = [topics(f"asked {number}", num_requests) for number in range(num_sequences)]
    rng = random.Random("uniform")  # noqa: S311
    mixed = [rng.choices(range(3, 8000), k=PROMPT_TOKENS) for _ in range(num_requests)]
    with serving(model, folder, file) as client:
        look(client, topics("learned", LEARNED_REQUESTS))
        client.drain()
        learned = file.read_bytes()
        client.undrain()
        settled = [look(client, prompts) for prompts in sequences]
        uniform = look(client, mixed)
    pairs = []
    for prompts, before in zip(sequences, settled, strict=True):
        with serving(model, folder, None) as client:
            without = look(client, prompts)
        file.write_bytes(learned)  # each server goes on with it, and saves that
        with serving(model, folder, file) as client:
            with_ = look(client, prompts)
        pairs.append(Pair(WINDOW_SLOTS * CAPPED.num_slots(model), before, without, with_))
    return HotSet(pairs, hit_rate(uniform))


@contextmanager
def serving(model: Path, folder: Path, hot_set: Path | None) -> Iterator[Client]:
    """A server that has just become READY, with places for half of the experts."""
    key = "MOE_SERVER_" + KEY.replace(".", "__").upper()
    environ = {**NO_REUSE, key: "off" if hot_set is None else str(hot_set)}
    with (
        started(model, CAPPED, folder, environ=environ) as server,
        Client(server.address) as client,
    ):
        yield client


def look(client: Client, prompts: Sequence[Sequence[int]]) -> list[Looked]:
    """What was found of what each request wanted, one after another."""
    stopping = generation_pb2.Stopping(max_new_tokens=1, ignore_eos=True)
    looked, before = [], _counts(client)
    for token_ids in prompts:
        for _ in client.generate_stream(token_ids, stopping=stopping):
            pass
        now = _counts(client)
        looked.append(Looked(now[0] - before[0], now[1] - before[1]))
        before = now
    return looked


def _counts(client: Client) -> tuple[int, int]:
    """Experts found in memory, and experts that had to come from disk, so far."""
    experts = client.status().experts
    return experts.device_hits + experts.host_hits, experts.disk_reads
