"""How much sooner a server that starts with a hot set finds its experts where they are wanted.

Traffic in which few topics are most of it: a topic is one token, as random weights route by the
token, and topics are drawn with Zipf's weights. Half of the experts have a place. A first server
serves it until its hit rate stands still, and ends, which saves what it has seen. Then one server
starts without that file and one with it, and both get the same requests. What counts is how many
requests come before the hit rate over the next `WINDOW` of them is the steady one.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.coldstart_ready import CAPPED, started
from moe_server.client import Client
from moe_server.config import known_keys
from moe_server.proto.moe_server.v1 import generation_pb2

KEY = "warmup.hot_set"
"""A file that is read at the start and written at the end, or \"off\"."""
NUM_TOPICS = 12
ZIPF = 1.2
PROMPT_TOKENS = 8
WINDOW = 8
NEAR = 0.95
"""Of the steady hit rate: as good as steady."""
NO_REUSE = {"MOE_SERVER_SCHEDULER__REUSE_PREFIXES": "false"}
"""Whatever is sent twice is to be computed twice."""


@dataclass(frozen=True)
class HotSet:
    """Hit rates, request by request: of wanted experts, how many were in memory."""

    before: list[float]
    """Of the server that learned; it ends in the steady state."""
    without: list[float]
    with_: list[float]
    uniform_rate: float
    """Of requests without topics, which no cache can serve better."""

    @property
    def steady_rate(self) -> float:
        """Of all three servers, over the later halves: none of them has another cache."""
        halves = [rates[len(rates) // 2 :] for rates in (self.before, self.without, self.with_)]
        return statistics.mean(rate for half in halves for rate in half)

    @property
    def requests_without(self) -> int:
        return until_steady(self.without, self.steady_rate)

    @property
    def requests_with(self) -> int:
        return until_steady(self.with_, self.steady_rate)

    @property
    def speedup(self) -> float:
        """How many times sooner the steady hit rate was there."""
        return self.requests_without / self.requests_with


def until_steady(rates: Sequence[float], steady_rate: float) -> int:
    """The number of the first request from which on the window's mean is as good as steady.

    All of them where none is. The window looks ahead: a cache that is right at once is right with
    the first request.
    """
    for index in range(len(rates) - WINDOW + 1):
        if statistics.mean(rates[index : index + WINDOW]) >= NEAR * steady_rate:
            return index + 1
    return len(rates)


def topics(seed: str, num_requests: int) -> list[list[int]]:
    """Prompts of skewed traffic; which topic is the common one is the same for every seed."""
    tokens = random.Random("topics").sample(range(3, 8000), NUM_TOPICS)  # noqa: S311
    weights = [rank**-ZIPF for rank in range(1, NUM_TOPICS + 1)]
    drawn = random.Random(seed).choices(tokens, weights, k=num_requests)  # noqa: S311
    return [[token] * PROMPT_TOKENS for token in drawn]


def is_available() -> bool:
    """Whether this checkout's server knows hot sets."""
    return KEY in known_keys()


def measure(model: Path, folder: Path, num_requests: int) -> HotSet:
    """Three servers, one after another. Needs root.

    Args:
        model: A checkpoint.
        folder: For logs, sockets and the hot set.
        num_requests: To each.
    """
    file = folder / "coldstart.hotset"
    file.unlink(missing_ok=True)
    learned = topics("learned", num_requests)
    before = hit_rates(model, folder, str(file), learned)
    rng = random.Random("uniform")  # noqa: S311
    mixed = [rng.choices(range(3, 8000), k=PROMPT_TOKENS) for _ in range(num_requests // 2)]
    asked = topics("asked", num_requests)
    without = hit_rates(model, folder, "off", [*asked, *mixed])
    with_ = hit_rates(model, folder, str(file), asked)
    return HotSet(before, without[:num_requests], with_, statistics.mean(without[num_requests:]))


def hit_rates(
    model: Path, folder: Path, hot_set: str, prompts: Sequence[Sequence[int]]
) -> list[float]:
    """Of each request to a server of its own, the share of wanted experts that were in memory."""
    environ = {**NO_REUSE, "MOE_SERVER_" + KEY.replace(".", "__").upper(): hot_set}
    stopping = generation_pb2.Stopping(max_new_tokens=1, ignore_eos=True)
    rates = []
    with (
        started(model, CAPPED, folder, environ=environ) as server,
        Client(server.address) as client,
    ):
        before = _counts(client)
        for token_ids in prompts:
            for _ in client.generate_stream(token_ids, stopping=stopping):
                pass
            now = _counts(client)
            found, wanted = now[0] - before[0], sum(now) - sum(before)
            rates.append(found / wanted)
            before = now
    return rates


def _counts(client: Client) -> tuple[int, int]:
    """Experts found in memory, and experts that had to come from disk, so far."""
    experts = client.status().experts
    return experts.device_hits + experts.host_hits, experts.disk_reads
