"""Does it ever pay to hold a request back because a larger batch touches more experts?

A step reads the experts of the union over its requests that have no slot; adding a request adds its
share of the union to everybody's step. Three questions, on the synthetic routing of `traces`:

- reads per token by batch size: where they fall, one more request pays in tokens per second;
- the same if requests of a kind decode together, in turns, where each kind has experts of its own;
- what those who wait gain or lose: a queue in front of a batch that is capped at so many requests,
  with steps that cost what was replayed.

    python -m benchmarks.batch_union

Prints tables and one JSON line, and keeps the latter in benchmarks/results/.
"""

import json
import os
import platform
import random
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks import checkout
from benchmarks.policy_simulator import replay
from benchmarks.traces import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TABLE_5,
    Experts,
    Routing,
    Trace,
    agreement,
    decode,
    skewed,
    union,
)
from moe_server.offload.policy import make_policy

KINDS = ("uniform", "paper", "skewed")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
SLOTS = (48, 96, 128, 170, 205, 230)
NUM_KINDS, TURN_STEPS = 4, 64
READ_S, COMPUTE_S = 0.07, 0.25
"""An expert of Mixtral's size from a disk of 5 GB/s; the rest of a step, experts that are there."""
QUEUED_SLOTS = (128, 230)
CAPS = (1, 2, 4, 8, 16, 32)
LOADS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Of the tokens per second of the largest batch."""
MEAN_TOKENS = 64
POLICY = "next-visit"


def reads_per_token(trace: Trace, num_slots: int) -> float:
    """With the default policy, all misses of a call under way at once."""
    policy = make_policy(POLICY, num_slots, trace.num_layers)
    return replay(trace, policy, num_slots, max_reads=num_slots).reads_per_token


def routing(kind: str, batch: int) -> Routing:
    """`batch` sequences: uniform, as local as in the Mixtral paper, or with popular experts too."""
    choose, paper = np.random.default_rng(0), agreement(TABLE_5)
    if kind == "uniform":
        return Routing(choose, batch)
    [popularity] = skewed(np.random.default_rng(1), 1)
    return Routing(choose, batch, paper, popularity if kind == "skewed" else None)


def by_batch(kind: str, num_slots: int) -> dict[int, float]:
    """Batch size -> reads per token."""
    return {
        batch: reads_per_token(
            decode(kind, routing(kind, batch), batch, max(40, 200 // batch)), num_slots
        )
        for batch in BATCHES
    }


def of_kinds(batch: int, num_steps: int, *, together: bool) -> Trace:
    """Requests of kinds with popular experts of their own: mixed, or each kind for some steps."""
    choose, paper = np.random.default_rng(0), agreement(TABLE_5)
    size = batch if together else batch // NUM_KINDS
    kinds = [
        Routing(choose, size, paper, popularity)
        for popularity in skewed(np.random.default_rng(1), NUM_KINDS)
    ]

    def steps() -> Iterator[list[Experts]]:
        for number in range(num_steps):
            turn = [kinds[number // TURN_STEPS % NUM_KINDS]] if together else kinds
            yield union(np.concatenate([one.next_token() for one in turn]))

    calls = [(layer, experts) for step in steps() for layer, experts in enumerate(step)]
    return Trace("kinds", NUM_LAYERS, NUM_EXPERTS, batch * num_steps, calls)


@dataclass(frozen=True, slots=True)
class Waited:
    """Seconds from arrival, means and 99th percentiles."""

    ttft: tuple[float, float]
    completion: tuple[float, float]


def queue(step_s: Mapping[int, float], cap: int, load: float, num_requests: int = 1000) -> Waited:
    """Requests arrive at random and start in order, `cap` side by side at most.

    Args:
        step_s: Batch size -> what a step takes; between them, a straight line.
        cap: The largest batch that is allowed.
        load: Arriving tokens per second over what the largest batch of `step_s` makes.
        num_requests: Until then.
    """
    choose = random.Random(0)  # noqa: S311
    sizes, costs = list(step_s), list(step_s.values())
    rate = load * max(step_s) / step_s[max(step_s)] / MEAN_TOKENS
    arrivals, arrived = deque[tuple[float, int]](), 0.0
    for _ in range(num_requests):
        arrived += choose.expovariate(rate)
        arrivals.append((arrived, 1 + int(choose.expovariate(1 / MEAN_TOKENS))))
    now = 0.0
    running: list[tuple[float, int]] = []
    first, last = list[float](), list[float]()
    while arrivals or running:
        if not running:
            now = max(now, arrivals[0][0])
        num_new = 0
        while arrivals and arrivals[0][0] <= now and len(running) < cap:
            running.append(arrivals.popleft())
            num_new += 1
        now += float(np.interp(len(running), sizes, costs))
        first += [now - came for came, _ in running[len(running) - num_new :]]
        last += [now - came for came, left in running if left == 1]
        running = [(came, left - 1) for came, left in running if left > 1]
    return Waited(_mean_and_p99(first), _mean_and_p99(last))


def _mean_and_p99(seconds: list[float]) -> tuple[float, float]:
    return statistics.mean(seconds), float(np.percentile(seconds, 99))


def main() -> None:
    """Replays, prints and keeps everything."""
    reads = {f"{kind}/{slots}": by_batch(kind, slots) for kind in KINDS for slots in SLOTS}
    print(f"{'reads per token, batch':26}" + "".join(f"{batch:8}" for batch in BATCHES))
    for name, row in reads.items():
        print(f"{name:26}" + "".join(f"{one:8.2f}" for one in row.values()))
    in_turns = {}
    print(f"\n{'batch 8 of 4 kinds, slots':26}{'mixed':>8}{'in turns':>10}")
    for slots in SLOTS:
        mixed, together = (
            reads_per_token(of_kinds(8, 1024, together=together), slots)
            for together in (False, True)
        )
        in_turns[slots] = together / mixed
        print(f"{slots:<26}{mixed:8.2f}{together:10.2f}")
    capped = {}
    print(f"\n{'seconds, by largest batch':26}{'ttft':>9}{'p99':>9}{'whole':>9}{'p99':>9}")
    for slots in QUEUED_SLOTS:
        row = reads[f"paper/{slots}"]
        step_s = {batch: COMPUTE_S + READ_S * batch * one for batch, one in row.items()}
        for load in LOADS:
            waited = {cap: queue(step_s, cap, load) for cap in CAPS}
            for cap, one in waited.items():
                figures = "".join(f"{value:9.1f}" for value in (*one.ttft, *one.completion))
                print(f"{f'{slots} slots, load {load}, {cap}':26}{figures}")
            whole = {cap: one.completion[0] for cap, one in waited.items()}
            best = min(value for cap, value in whole.items() if cap < max(CAPS))
            capped[f"{slots}/{load}"] = best / whole[max(CAPS)]
    commit = checkout.commit()
    line = {
        "bench": "union",
        "commit": commit,
        "hardware": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "ceilings": {},
        "results": {"reads_per_token": reads, "in_turns_over_mixed": in_turns},
        "ratios": capped,
    }
    checkout.RESULTS.mkdir(exist_ok=True)
    (checkout.RESULTS / f"union-{commit}.json").write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
