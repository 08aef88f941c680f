"""What becomes of requests, counted where they pass: accepted, refused, finished, and how fast.

The services follow each of their requests with it; the warm-up's are not users' and count nowhere.
Knows nothing of engines: what they say about themselves is read by `status_metrics`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from moe_server.service.errors import code_of

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)
TPOT_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
"""From a small model in memory to a large one that is read from a slow disk for every token."""


class RequestMetrics:
    """Counters and histograms of a server's requests, by model.

    Args:
        registry: Where they can be read; None: nowhere.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self.accepted = Counter(
            "moe_server_requests_accepted",
            "Requests that were handed to the engine.",
            ["model"],
            registry=registry,
        )
        self.refused = Counter(
            "moe_server_requests_refused",
            "Requests that ended before they reached the engine, by gRPC status code.",
            ["model", "code"],
            registry=registry,
        )
        self.finished = Counter(
            "moe_server_requests_finished",
            "Accepted requests that have ended, by gRPC status code.",
            ["model", "code"],
            registry=registry,
        )
        self.generated_tokens = Counter(
            "moe_server_generated_tokens",
            "Tokens of completions that clients were given.",
            ["model"],
            registry=registry,
        )
        self.ttft = Histogram(
            "moe_server_time_to_first_token_seconds",
            "From a request's arrival until its first token leaves.",
            ["model"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "moe_server_time_per_output_token_seconds",
            "Mean time between the tokens of one completion.",
            ["model"],
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )

    @contextmanager
    def follow(self, model: str) -> Iterator["FollowedRequest"]:
        """One request from its arrival to its end, however that comes."""
        request = FollowedRequest(self, model)
        code = "OK"
        try:
            yield request
        except BaseException as error:
            code = code_of(error).name
            raise
        finally:
            request.end(code)


@dataclass(slots=True)
class _Pace:
    """When the tokens of one completion came."""

    first_at: float
    last_at: float
    num_later: int = 0
    """Those that came together with the first one took no time of their own."""


class FollowedRequest:
    """What `RequestMetrics.follow` gives: told what happens to one request."""

    def __init__(self, metrics: RequestMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived_at = time.monotonic()
        self._paces: dict[int, _Pace] = {}
        self._is_accepted = False

    def accept(self) -> None:
        """It was handed to the engine; of a request in several parts the first one counts."""
        if not self._is_accepted:
            self._is_accepted = True
            self._metrics.accepted.labels(self._model).inc()

    def take_tokens(self, count: int, sample: int) -> None:
        """So many tokens of a sample go to the client."""
        if not count:
            return
        now = time.monotonic()
        if not self._paces:
            self._metrics.ttft.labels(self._model).observe(now - self._arrived_at)
        if pace := self._paces.get(sample):
            pace.last_at = now
            pace.num_later += count
        else:
            self._paces[sample] = _Pace(now, now)
        self._metrics.generated_tokens.labels(self._model).inc(count)

    def end(self, code: str) -> None:
        """It is over, with that status."""
        kind = self._metrics.finished if self._is_accepted else self._metrics.refused
        kind.labels(self._model, code).inc()
        for pace in self._paces.values():
            if pace.num_later:
                mean_s = (pace.last_at - pace.first_at) / pace.num_later
                self._metrics.tpot.labels(self._model).observe(mean_s)
