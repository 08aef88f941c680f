"""Which eviction policy is the default: every policy on every trace, against the optimum.

A miss is a read of one expert: 99 to 352 MB of Mixtral 8x7B, and the disk is what decides. So the
figures are hit rates and reads per token, and neither depends on the machine. The policies are the
objects that the cache uses, driven in the cache's order of calls by `policy_simulator`.

    python -m benchmarks.policy_replay        (QUICK=1: shorter traces, three capacities)

Prints tables and one JSON line, and keeps the latter in benchmarks/results/.
"""

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from benchmarks import checkout
from benchmarks.policy_simulator import Belady, LookAhead, Replayed, replay
from benchmarks.traces import Trace, recorded, synthetic
from moe_server.offload.layout import ExpertId
from moe_server.offload.policy import POLICIES, make_policy

QUICK = os.environ.get("QUICK", "") not in {"", "0"}
SHARES = (0.25, 0.5, 0.78) if QUICK else (0.125, 0.25, 0.375, 0.5, 0.664, 0.78)
"""Of the experts that have slots: 32, 64, 96, 128, 170 and 200 of 256."""
OPTIMA = ("belady, equal quotas", "belady")
LOOK_AHEAD_CALLS = (0, 1, 8, 32)
"""Calls, so layers, that are known in advance; 32 are a step of the synthetic traces."""
MAX_READS = (1, 2, 4, sys.maxsize)
DEEPENED = ("paper/b1", "paper/b8", "skewed/b8", "demo/b8")
"""Traces on which look-ahead and the number of reads under way are varied."""

Cells = dict[str, dict[str, Replayed]]
"""Row -> column -> what was counted."""


def num_slots(trace: Trace, share: float) -> int:
    """Slots for a share of the experts; at least one."""
    return max(1, round(share * trace.num_slots_total))


def compare(trace: Trace) -> Cells:
    """Every policy and both optima at every capacity."""
    cells: Cells = {}
    for name in (*POLICIES, *OPTIMA):
        cells[name] = {}
        for share in SHARES:
            capacity = num_slots(trace, share)
            if name in OPTIMA:
                optimum = Belady(trace, capacity, per_layer=name == OPTIMA[0])
                counted = replay(trace, optimum, capacity, max_reads=1)
            else:
                policy = make_policy(name, capacity, trace.num_layers)
                counted = replay(trace, policy, capacity)
            cells[name][f"{share:.1%}"] = counted
    return cells


def deepen(trace: Trace) -> Cells:
    """next-visit with half of the experts held: with look-ahead, and with fewer reads under way."""
    capacity = num_slots(trace, 0.5)
    ahead, reads = {}, {}
    for num_calls in LOOK_AHEAD_CALLS:
        policy = make_policy("next-visit", capacity, trace.num_layers)
        ahead[f"{num_calls} layers"] = replay(
            trace, LookAhead(policy, trace, num_calls), capacity, max_reads=1
        )
    for max_reads in MAX_READS:
        policy = make_policy("next-visit", capacity, trace.num_layers)
        column = "any" if max_reads == sys.maxsize else f"{max_reads} reads"
        reads[column] = replay(trace, policy, capacity, max_reads)
    return {"knowing the next": ahead, "under way at most": reads}


def microseconds_per_acquire(
    name: str, num_layers: int, num_experts: int, top_k: int, share: float = 0.5
) -> float:
    """What a policy's calls cost: uniform routing, batch 1, every call that `acquire` makes."""
    choose = random.Random(0)  # noqa: S311
    capacity = round(num_layers * num_experts * share)
    policy = make_policy(name, capacity, num_layers)
    steps = [
        [[ExpertId(layer, one) for one in choose.sample(range(num_experts), top_k)]]
        for _ in range(max(30, 3000 // num_layers))
        for layer in range(num_layers)
    ]
    times = []
    for [wanted] in steps:
        started = time.perf_counter()
        missing = []
        for expert in wanted:
            if expert in policy:
                policy.touch(expert)
            else:
                missing.append(expert)
        for expert in missing:
            if len(policy) == capacity:
                victim = policy.victim(expert, ())
                assert victim is not None
                policy.remove(victim)
            policy.add(expert)
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[len(times) // 2 :])


def print_table(title: str, cells: Cells) -> None:
    """Hit rate and reads per token."""
    columns = next(iter(cells.values()))
    print(f"\n{title:22}" + "".join(f"{column:>16}" for column in columns))
    for row, counted in cells.items():
        figures = (
            f"{100 * one.hit_rate:8.1f} %{one.reads_per_token:6.1f}" for one in counted.values()
        )
        print(f"{row:22}" + "".join(figures))


def ratios(compared: dict[str, Cells]) -> dict[str, float]:
    """Reads of each policy over those of the per-layer LRU, by trace: means over capacities."""
    return {
        f"{trace}/{name}": round(
            statistics.mean(
                one.misses / max(1, cells["layer-lru"][share].misses)
                for share, one in cells[name].items()
            ),
            4,
        )
        for trace, cells in compared.items()
        for name in cells
    }


def as_json(cells: Cells) -> dict[str, dict[str, list[float]]]:
    """Row -> column -> [hit rate, reads per token]."""
    return {
        row: {
            column: [round(one.hit_rate, 4), round(one.reads_per_token, 3)]
            for column, one in counted.items()
        }
        for row, counted in cells.items()
    }


def main() -> None:
    """Replays, prints and keeps everything."""
    traces = [*synthetic(quick=QUICK), *recorded()]
    deep = [trace for trace in traces if trace.name in DEEPENED]
    with ProcessPoolExecutor() as pool:
        compared = _by_name(traces, pool.map(compare, traces))
        deepened = _by_name(deep, pool.map(deepen, deep))
    print("Hit rate, and experts read per token, by share of the experts that have slots")
    for name, cells in compared.items():
        print_table(name, cells)
    print("\nnext-visit with half of the experts held")
    for name, cells in deepened.items():
        for row, counted in cells.items():
            print_table(name, {row: counted})
    costs = {
        name: {
            "32 x 8, top 2": round(microseconds_per_acquire(name, 32, 8, 2), 2),
            "48 x 128, top 8": round(microseconds_per_acquire(name, 48, 128, 8), 2),
        }
        for name in POLICIES
    }
    print("\nmicroseconds per acquire at batch 1, half held (layers x experts)")
    for name, cost in costs.items():
        print(f"{name:22}", cost)
    commit = checkout.commit()
    line = {
        "bench": "policy",
        "commit": commit,
        "hardware": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "ceilings": {},
        "results": {
            "replayed": {name: as_json(cells) for name, cells in compared.items()},
            "deepened": {name: as_json(cells) for name, cells in deepened.items()},
            "us_per_acquire": costs,
        },
        "ratios": ratios(compared),
    }
    checkout.RESULTS.mkdir(exist_ok=True)
    suffix = "-quick" if QUICK else ""
    (checkout.RESULTS / f"policy-{commit}{suffix}.json").write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


def _by_name(traces: Iterable[Trace], cells: Iterable[Cells]) -> dict[str, Cells]:
    return {trace.name: counted for trace, counted in zip(traces, cells, strict=True)}


if __name__ == "__main__":
    main()
