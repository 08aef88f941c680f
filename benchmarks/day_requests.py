"""The requests of a day: 150,000 of microservices, most of them while people work.

Arrivals are a Poisson process whose rate follows the hour, with bursts in which one service sends
its backlog. Prompts have 2,000 tokens on average; how many are generated depends on the task. Knows
no server.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

DAY_S = 86_400.0
PER_DAY = 150_000
PEAK_HOUR = 14.0
SWING = 0.6
"""The busiest hour has 1 + SWING times the mean rate, the quietest 1 - SWING."""
BURSTS_PER_DAY = 48
BURST_REQUESTS = 200
BURST_S = 60.0
"""48 bursts of 200 are 6 % of a day's requests: 3.3/s more for a minute, twice an hour."""
MEAN_PROMPT, SIGMA_PROMPT = 2000, 0.4
SHORTEST_PROMPT, LONGEST_PROMPT = 64, 8000


@dataclass(frozen=True)
class Task:
    """What a service asks for."""

    name: str
    share: float
    mean_new_tokens: float
    max_new_tokens: int
    deadline_s: float
    priority: int


TASKS = (
    Task("classification", 0.4, 3, 8, 15.0, 1),
    Task("routing", 0.2, 4, 8, 10.0, 2),
    Task("extraction", 0.2, 60, 256, 60.0, 0),
    Task("structured data", 0.1, 150, 512, 120.0, 0),
    Task("generation", 0.1, 300, 1024, 300.0, 0),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One of them."""

    arrives_s: float
    """Since midnight."""
    prompt_tokens: int
    new_tokens: int
    task: Task


def requests(
    per_day: float, seed: int, begin_s: float = 0.0, end_s: float = DAY_S
) -> Iterator[Request]:
    """In order of arrival.

    Args:
        per_day: How many a whole day has.
        seed: Of all that is random.
        begin_s: Since midnight.
        end_s: Since midnight.
    """
    rng = random.Random(seed)  # noqa: S311
    scale = per_day / PER_DAY
    bursts = sorted(rng.random() * (DAY_S - BURST_S) for _ in range(BURSTS_PER_DAY))
    in_bursts = BURSTS_PER_DAY * BURST_REQUESTS
    base = (PER_DAY - in_bursts) / DAY_S
    # Bursts can coincide; thinning needs a bound, and a tight one draws less in vain.
    most = max(sum(begin <= at < begin + BURST_S for begin in bursts) for at in bursts)
    highest = scale * (base * (1 + SWING) + most * BURST_REQUESTS / BURST_S)
    at = begin_s
    while (at := at + rng.expovariate(highest)) < end_s:
        active = bisect_right(bursts, at) - bisect_right(bursts, at - BURST_S)
        if rng.random() * highest < scale * (
            base * _hourly(at) + active * BURST_REQUESTS / BURST_S
        ):
            yield _request(at, rng)


def _hourly(at_s: float) -> float:
    return 1 + SWING * math.cos(2 * math.pi * (at_s / 3600 - PEAK_HOUR) / 24)


def _request(at: float, rng: random.Random) -> Request:
    [task] = rng.choices(TASKS, [task.share for task in TASKS])
    mu = math.log(MEAN_PROMPT) - SIGMA_PROMPT**2 / 2
    prompt = round(rng.lognormvariate(mu, SIGMA_PROMPT))
    prompt = min(max(prompt, SHORTEST_PROMPT), LONGEST_PROMPT)
    new = min(1 + round(rng.expovariate(1 / (task.mean_new_tokens - 1))), task.max_new_tokens)
    return Request(at, prompt, new, task)
