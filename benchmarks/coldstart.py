"""The cold start: how soon a server is READY, how its first requests fare, what can keep it.

    make bench-coldstart [QUICK=1] [ARGS="--only ready chaos --repetitions 3"]

Four parts, each a module of its own, on four layers of Mixtral 8x7B's size with nothing in the page
cache; once with places for half of the experts, the processes in a memory group that holds no more,
and once with places for all:

- `ready/limit` (`coldstart_ready`): seconds from process start to READY over 1.15 times what the
  disk, measured in the same minutes, takes for the model, and 2 s. Of the two the worse.
- `first_ttft/steady` (`coldstart_first`): the first request's time to first token over the steady
  median, and the 99th percentile of the first 100 against the limit that was configured; beside
  it, the same requests to an engine that nobody warmed up. Of the two the worse.
- `hotset/speedup` (`coldstart_hotset`): how many times sooner, in experts wanted, a server that
  starts with a hot set hits as often as one that has served the same skewed traffic for long.
- `chaos` (`coldstart_chaos`, `chaos`): kill -9 at every stage, a slow disk, a shard missing, read
  errors, memory that shrinks. Its ratio `chaos/passed` is a share of the scenarios.

QUICK takes smaller models and fewer requests. Needs root, for the page cache and caps on memory.
Files are kept in $MOE_BENCH_DIR (default /var/tmp/moe-bench); models take at most $MOE_BENCH_MAX_GB
(default 45) there. Prints tables and one JSON line; unless QUICK, it is kept in
benchmarks/results/, under the names of its parts where it has some of them only, with a picture
that needs matplotlib (the extra `bench`).
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import (
    ceilings,
    coldstart_chaos,
    coldstart_first,
    coldstart_hotset,
    coldstart_picture,
    coldstart_ready,
    parts,
)
from benchmarks.child import can_cap
from benchmarks.coldstart_first import Counts, First
from benchmarks.coldstart_hotset import HotSet
from benchmarks.coldstart_ready import ARMS, Start
from benchmarks.models import ModelFolder
from benchmarks.scene import Outcome

MODEL, MODEL_QUICK, MODEL_CHAOS_QUICK = "bf16-4", "bf16-small", "bf16-tiny"
REPETITIONS, REPETITIONS_QUICK = 3, 1
COUNTS = {"half": Counts(100, 20, 30), "whole": Counts(100, 40, 100)}
COUNTS_QUICK = {"half": Counts(20, 10, 20), "whole": Counts(20, 10, 20)}
HOT_SET, HOT_SET_QUICK = (7, 40), (1, 20)
"""Sequences, and requests of each."""
DISK_READ_BYTES = 2**28
READY, FIRST, HOTSET, CHAOS = (
    "ready/limit",
    "first_ttft/steady",
    "hotset/speedup",
    "chaos/passed",
)
AT_LEAST = {HOTSET: 5.0, CHAOS: 1.0}
AT_MOST = {READY: 1.0, FIRST: 1.1}


class Report(parts.Report):
    """What the parts have found so far."""

    def __init__(
        self, folder: Path, models: ModelFolder, names: Sequence[str], *, quick: bool
    ) -> None:
        super().__init__(folder, models, names, quick=quick)
        self.model = models.require(MODEL_QUICK if quick else MODEL)
        self.results["model"] = self.model.name
        self.starts: list[Start] = []
        self.firsts: list[First] = []
        self.hot_set: HotSet | None = None

    def disk_bytes_per_s(self) -> float:
        """Measured now."""
        found = ceilings.disk_bytes_per_s(sorted(self.model.glob("*.safetensors")), DISK_READ_BYTES)
        self.ceilings["disk_bytes_per_s"] = found
        return found


def main() -> int:
    """Measures and reports."""
    benchmark = parts.Benchmark("coldstart", list(PARTS), AT_LEAST, AT_MOST)
    args = benchmark.arguments(__doc__ or "", "of the starts that are timed")
    why_not = can_cap()
    if why_not is not None:
        raise SystemExit(f"Cold starts are not measured: {why_not}.")
    report = Report(*parts.open_folder(), args.only, quick=args.quick)
    benchmark.run(PARTS, report, args.repetitions)

    def draw(picture: Path) -> None:
        if report.starts or report.firsts or report.hot_set:
            print(coldstart_picture.draw(report.starts, report.firsts, report.hot_set, picture))

    return benchmark.tell(report, draw)


def _ready(report: Report, repetitions: int | None) -> None:
    for number in range(repetitions or (REPETITIONS_QUICK if report.quick else REPETITIONS)):
        for arm in ARMS:
            start = coldstart_ready.measure(
                report.model, arm, report.folder, report.disk_bytes_per_s
            )
            report.starts.append(start)
            print(
                f"{number}: {arm.name} of the experts: READY after {start.ready_s:.1f} s, the port "
                f"after {start.port_s:.2f} s; limit {start.limit_s:.1f} s: {start.ratio:.2f}; "
                f"{start.read_bytes / 1e9:.1f} GB read for {start.model_bytes / 1e9:.1f} "
                f"({start.ratio_as_read:.2f} of the limit for those); disk "
                f"{start.disk_bytes_per_s / 1e9:.2f} GB/s; {start.kernel_s:.1f} s of processor "
                "time in the kernel"
            )
            print("   " + ", ".join(f"{name} {s:.1f}" for name, s in start.stages_s.items()))
            for fault in start.faults:
                print(f"   wrong: {fault}")
    report.results["ready"] = {
        arm.name: _of_arm([start for start in report.starts if start.arm == arm.name])
        for arm in ARMS
    }
    report.ratios[READY] = coldstart_ready.worst_ratio(report.starts)


def _of_arm(starts: Sequence[Start]) -> dict[str, Any]:
    return {
        "ratio": statistics.median(start.ratio for start in starts),
        "ratio_as_read": statistics.median(start.ratio_as_read for start in starts),
        "ready_s": statistics.median(start.ready_s for start in starts),
        "kernel_s": statistics.median(start.kernel_s for start in starts),
        "port_s": max(start.port_s for start in starts),
        "faults": [fault for start in starts for fault in start.faults],
        "starts": [asdict(start) | {"limit_s": start.limit_s} for start in starts],
    }


def _first(report: Report, _repetitions: int | None) -> None:
    counts = COUNTS_QUICK if report.quick else COUNTS
    found = {}
    for arm in ARMS:
        first = coldstart_first.measure(report.model, arm, report.folder, counts[arm.name])
        report.firsts.append(first)
        print(
            f"{arm.name} of the experts: first request over steady median "
            f"{', '.join(f'{ratio:.2f}' for ratio in first.ratios)}; p99 of the first "
            f"{len(first.ttfts_s[-1])} {first.p99_ms:.0f} ms, limit {first.max_ttft_ms:.0f} ms "
            f"{'kept' if first.within_limit else 'MISSED'}; without warm-up the first takes "
            f"{first.unwarmed_s[0]:.1f} s, {first.unwarmed_ratio:.1f} times the steady median"
        )
        found[arm.name] = asdict(first) | {
            "ratios": first.ratios,
            "p99_ms": first.p99_ms,
            "within_limit": first.within_limit,
            "unwarmed_ratio": first.unwarmed_ratio,
        }
    report.results["first"] = found
    report.ratios[FIRST] = max(first.ratio for first in report.firsts)


def _hot_set(report: Report, repetitions: int | None) -> None:
    if not coldstart_hotset.is_available():
        print("hotset: this checkout's server knows none.")
        return
    num_sequences, num_requests = HOT_SET_QUICK if report.quick else HOT_SET
    found = report.hot_set = coldstart_hotset.measure(
        report.model, report.folder, repetitions or num_sequences, num_requests
    )
    print(
        f"hotset: hit rate of a settled server {found.settled_rate:.2f} (requests without topics: "
        f"{found.uniform_rate:.2f}), reached when {found.wanted_with:g} experts had been wanted "
        f"with a hot set, {found.wanted_without:g} without: {found.speedup:.1f} times sooner"
    )
    report.results["hotset"] = asdict(found) | {
        "settled_rate": found.settled_rate,
        "wanted_with": [pair.wanted_with for pair in found.pairs],
        "wanted_without": [pair.wanted_without for pair in found.pairs],
    }
    report.ratios[HOTSET] = found.speedup


def _chaos(report: Report, _repetitions: int | None) -> None:
    def told(outcome: Outcome) -> None:
        recovered = "" if outcome.recovered_s is None else f"{outcome.recovered_s:.1f} s"
        verdict = "passed" if outcome.passed else "FAILED"
        print(f"  {outcome.name:48} {verdict} {recovered:>7}  {outcome.said[:90]}", flush=True)
        for problem in outcome.problems:
            print(f"    {problem}")

    print("chaos: scenario, verdict, time to recover, what it said")
    model = report.models.require(MODEL_CHAOS_QUICK) if report.quick else report.model
    outcomes = coldstart_chaos.run(
        model, report.folder / "chaos", report.disk_bytes_per_s(), told, quick=report.quick
    )
    report.results["chaos"] = [asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes]
    report.ratios[CHAOS] = sum(outcome.passed for outcome in outcomes) / len(outcomes)


PARTS: dict[str, parts.Part] = {
    "ready": _ready,
    "first": _first,
    "hotset": _hot_set,
    "chaos": _chaos,
}

if __name__ == "__main__":
    sys.exit(main())
