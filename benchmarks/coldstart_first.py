"""The first requests after READY, and the same requests to an engine that nobody has warmed up.

Requests of new random tokens, one after another; the time to each one's first token. A first server
gives the steady median, from which the configured limit comes; two more have to prove that limit
before they are READY, and their first 100 requests are held to it. All begin on a cold page cache.

The run without warm-up is no server of ours, which has no such option: the same engine in a process
of its own gets its first request as soon as its dense weights are there, and reads an expert when a
request wants it (`coldstart_unwarmed`).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import checkout
from benchmarks.cgroups import memory_group, within
from benchmarks.child import drop_page_cache
from benchmarks.coldstart_ready import Arm, started
from benchmarks.loads import prompt
from moe_server.client import Client
from moe_server.proto.moe_server.v1 import generation_pb2

PROMPT_TOKENS = 16
NUM_LIMITED = 2
"""Servers that have a limit."""
LIMIT_OVER_STEADY = 1.5
"""The limit that is configured, over the steady median."""
UNWARMED_TIMEOUT_S = 900


@dataclass(frozen=True)
class Counts:
    """Requests sent, one after another."""

    first: int
    """To each server that has a limit: those that are held to it."""
    steady: int
    """To the one before it, which has none."""
    unwarmed: int
    """To the engine without warm-up."""


@dataclass(frozen=True)
class First:
    """The first requests of servers of one kind."""

    arm: str
    max_ttft_ms: float
    """What all servers but the first had to prove."""
    ttfts_s: list[list[float]]
    """Of each server, in the order of the requests."""
    unwarmed_s: list[float]
    """Without warm-up."""

    @property
    def ratios(self) -> list[float]:
        """Of each server, its first request's over its steady median."""
        return [first_over_steady(ttfts) for ttfts in self.ttfts_s]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def p99_ms(self) -> float:
        """Of the servers that had the limit, the worse one's."""
        return 1000 * max(percentile(ttfts, 0.99) for ttfts in self.ttfts_s[1:])

    @property
    def within_limit(self) -> bool:
        return self.p99_ms <= self.max_ttft_ms

    @property
    def unwarmed_ratio(self) -> float:
        """The spike: without warm-up, the first over the steady median."""
        return first_over_steady(self.unwarmed_s)


def first_over_steady(ttfts_s: Sequence[float]) -> float:
    """The first request's time over the median of the later half."""
    return ttfts_s[0] / steady(ttfts_s)


def steady(ttfts_s: Sequence[float]) -> float:
    """The median of the later half."""
    return statistics.median(ttfts_s[len(ttfts_s) // 2 :])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(1e6 * share * len(ordered)) // 1_000_000) - 1)]


def measure(model: Path, arm: Arm, folder: Path, counts: Counts) -> First:
    """A server without a limit, some with the limit that follows, an engine without warm-up.

    Needs root.

    Args:
        model: A checkpoint.
        arm: How much memory it may take.
        folder: For logs and sockets.
        counts: How many requests each gets.
    """
    without = served(model, arm, folder, 0, counts.steady, None)
    max_ttft_ms = 1000 * LIMIT_OVER_STEADY * steady(without)
    limited = [
        served(model, arm, folder, number, counts.first, max_ttft_ms)
        for number in range(1, NUM_LIMITED + 1)
    ]
    unwarmed_s = unwarmed(model, arm, folder, counts.unwarmed)
    return First(arm.name, max_ttft_ms, [without, *limited], unwarmed_s)


def served(
    model: Path,
    arm: Arm,
    folder: Path,
    number: int,
    num_requests: int,
    max_ttft_ms: float | None,
) -> list[float]:
    """Times to first tokens of a server's first requests, from READY on.

    Raises:
        ServerFailedError: It did not become READY, or did not keep the limit.
    """
    environ = {} if max_ttft_ms is None else {"MOE_SERVER_WARMUP__MAX_TTFT_MS": str(max_ttft_ms)}
    with (
        started(model, arm, folder, environ=environ) as server,
        Client(server.address) as client,
    ):
        return [
            _ttft_s(client, prompt(f"first/{number}/{index}", PROMPT_TOKENS))
            for index in range(num_requests)
        ]


def unwarmed(model: Path, arm: Arm, folder: Path, num_requests: int) -> list[float]:
    """Times to first tokens of an engine that was not warmed up."""
    job = {
        "model": str(model),
        "flags": arm.flags(model),
        "prompts": [prompt(f"first/{index}", PROMPT_TOKENS) for index in range(num_requests)],
    }
    file = folder / "coldstart-unwarmed.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.coldstart_unwarmed", str(file)]
    with memory_group(arm.cap_bytes(model)) as group:
        drop_page_cache()
        told = subprocess.run(
            within([] if group is None else [group], command),
            cwd=checkout.ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=UNWARMED_TIMEOUT_S,
        ).stdout
    ttfts: list[float] = json.loads(told.splitlines()[-1])
    return ttfts


def _ttft_s(client: Client, token_ids: list[int]) -> float:
    stopping = generation_pb2.Stopping(max_new_tokens=1, ignore_eos=True)
    sent = time.perf_counter()
    first_s = None
    for event in client.generate_stream(token_ids, stopping=stopping):
        if event.HasField("delta") and first_s is None:
            first_s = time.perf_counter() - sent
    assert first_s is not None
    return first_s
