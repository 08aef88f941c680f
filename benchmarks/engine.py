"""The engine process around the model: what it costs, how it fails, what it stands.

    make bench-engine [QUICK=1] [ARGS="--only throughput day --repetitions 1"]

Four parts, each a module of its own:

- `restart/ready` (`engine_restart`): the seconds until a server whose engine was killed under load
  is READY again, over those of its first start from a cold disk; on two layers of Mixtral 8x7B's
  size, half of whose experts have a place. Needs root, to drop the page cache.
- `throughput/b8`, `throughput/b32` (`engine_throughput`): tokens per second through the whole
  server over the bare model's, on four resident layers in int4; and what each piece beside the
  model takes in a step (`engine_pieces`).
- `soak` (`soak`, `soak_engine`): ten minutes of three times the load that the server can take, many
  clients ill-behaved.
- `day` (`engine_day`): 150,000 requests a day simulated on the mission's hardware, with the real
  scheduler; a picture needs matplotlib (the extra `bench`).

QUICK takes a smaller model for the throughput, half a minute of soak and the busiest hour of the
day. Files are kept in $MOE_BENCH_DIR (default /var/tmp/moe-bench); models take at most
$MOE_BENCH_MAX_GB (default 45) there. Prints a table and one JSON line; unless QUICK, it is kept in
benchmarks/results/, under the names of its parts where it has some of them only.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import (
    ceilings,
    checkout,
    day_picture,
    engine_day,
    engine_restart,
    engine_throughput,
    parts,
    soak,
    soak_engine,
)
from benchmarks.models import ModelFolder

RESTARTED, RESIDENT, RESIDENT_QUICK = "bf16-2", "int4-4-synth", "int4-small"
REPETITIONS = 3
ROUNDS, ROUNDS_QUICK = 8, 2
NEW_TOKENS = 32
SOAK_S, SOAK_QUICK_S = 600.0, 30.0
SOAK_ENGINE_S, SOAK_ENGINE_QUICK_S = 60.0, 10.0
READY, DRIFT, WRONG = "restart/ready", "soak/memory-drift", "soak/wrong"
AT_LEAST = {"throughput/b8": 0.9, "throughput/b32": 0.9}
AT_MOST = {READY: 0.25, DRIFT: 0.02, WRONG: 0.0}


class Report(parts.Report):
    """What the parts have found so far."""

    def __init__(
        self, folder: Path, models: ModelFolder, names: Sequence[str], *, quick: bool
    ) -> None:
        super().__init__(folder, models, names, quick=quick)
        self.day: list[engine_day.Found] = []


def main() -> int:
    """Measures and reports."""
    benchmark = parts.Benchmark("engine", list(PARTS), AT_LEAST, AT_MOST)
    args = benchmark.arguments(__doc__ or "", "of the restart and the throughput")
    if "restart" in args.only and os.geteuid() != 0:
        raise SystemExit(
            "The restart is not measured: dropping the page cache needs root. For the rest: "
            "--only throughput soak day"
        )
    report = Report(*parts.open_folder(), args.only, quick=args.quick)
    benchmark.run(PARTS, report, args.repetitions)

    def draw(picture: Path) -> None:
        if report.day and not report.quick:
            print(day_picture.draw(report.day, picture))

    return benchmark.tell(report, draw)


def _restart(report: Report, repetitions: int | None) -> None:
    model = report.models.require(RESTARTED)
    restarts, disk = [], []
    for number in range(repetitions or (1 if report.quick else REPETITIONS)):
        disk.append(ceilings.disk_bytes_per_s(sorted(model.glob("*.safetensors")), 2**28))
        restart = engine_restart.measure(model, report.folder)
        restarts.append(restart)
        print(
            f"{number}: READY after {restart.first_ready_s:.1f} s, again "
            f"{restart.ready_again_s:.1f} s after the kill ({restart.ratio:.2f}), "
            f"{restart.read_bytes / 1e9:.1f} GB read; {restart.streams_told_to_retry} of "
            f"{engine_restart.NUM_STREAMS} streams told to retry; disk {disk[-1] / 1e9:.2f} GB/s"
        )
    report.ceilings["disk_bytes_per_s"] = statistics.median(disk)
    report.results["restart"] = [asdict(restart) for restart in restarts]
    report.ratios[READY] = engine_restart.ratio(restarts)


def _throughput(report: Report, repetitions: int | None) -> None:
    name = RESIDENT_QUICK if report.quick else RESIDENT
    count = repetitions or (ROUNDS_QUICK if report.quick else ROUNDS)
    model = report.models.require(name)
    rounds = engine_throughput.measure(model, report.folder, count, NEW_TOKENS)
    found = engine_throughput.summarised(rounds)
    print(f"throughput on {name}, medians of {count} rounds:")
    for key, figures in found.items():
        print(
            f"  {key}: {figures['server_tokens_per_s']:.1f} tokens/s, bare "
            f"{figures['bare_tokens_per_s']:.1f}: {figures['ratio']:.3f}; processor time of a step "
            f"{figures['engine_cpu_ms']:.0f} + {figures['front_door_cpu_ms']:.1f} ms, bare "
            f"{figures['bare_cpu_ms']:.0f}: {figures['processor_ratio']:.3f}"
        )
        report.ratios[f"throughput/{key}"] = figures["ratio"]
    pieces = {f"b{batch}": _pieces(batch) for batch in engine_throughput.BATCHES}
    for key, of_batch in pieces.items():
        print(f"  {key}, us: " + ", ".join(f"{piece} {us:.0f}" for piece, us in of_batch.items()))
    all_same = all(one.same_tokens for one in rounds)
    report.results["throughput"] = {
        "model": name,
        "same_tokens": all_same,
        **found,
        "pieces_us": pieces,
        "rounds": [asdict(one) for one in rounds],
    }


def _pieces(batch: int) -> dict[str, float]:
    """In a process of its own, whose threads wait as the engine's do."""
    command = [sys.executable, "-m", "benchmarks.engine_pieces", str(batch)]
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    told = subprocess.run(
        command, env=environ, cwd=checkout.ROOT, capture_output=True, text=True, check=True
    ).stdout
    pieces: dict[str, float] = json.loads(told.splitlines()[-1])
    return pieces


def _soak(report: Report, _repetitions: int | None) -> None:
    found = soak.run(SOAK_QUICK_S if report.quick else SOAK_S, report.folder)
    inside = soak_engine.run(SOAK_ENGINE_QUICK_S if report.quick else SOAK_ENGINE_S)
    print(
        f"soak: {found.seconds:.0f} s at {found.arrivals_per_s:.1f} requests/s, {found.accepted} "
        f"accepted, {found.refused} refused, {found.preemptions} preemptions; memory moved by "
        f"{100 * found.drift:.2f} % in the last half; left over {found.left_over}; in one "
        f"process {inside.steps} steps, {inside.requests} requests"
    )
    wrong = [*found.wrong, *inside.wrong]
    for one in wrong:
        print(f"  wrong: {one}")
    left = sum(found.left_over.values()) + inside.blocks_left
    report.results["soak"] = {"server": asdict(found), "engine": asdict(inside)}
    report.ratios[WRONG] = float(found.num_wrong + len(inside.wrong) + left)
    if not report.quick:  # half a minute is too short for it
        report.ratios[DRIFT] = found.drift


def _day(report: Report, _repetitions: int | None) -> None:
    report.day = engine_day.run(quick=report.quick)
    for found in report.day:
        print(f"{found.arm.name}: {found.sustained_per_day:,} requests a day sustained")
        for load, each in found.busiest.items():
            print(
                f"  {load:7,}: {100 * each['done']:5.1f} % done, TTFT {each['ttft_p50_s']:.2f} "
                f"(p99 {each['ttft_p99_s']:.2f}) s, TPOT {each['tpot_p50_s']:.3f} "
                f"({each['tpot_p99_s']:.3f}) s, {100 * each['utilisation']:.0f} % busy"
            )
    report.results["day"] = {found.arm.name: found.results() for found in report.day}


PARTS: dict[str, parts.Part] = {
    "restart": _restart,
    "throughput": _throughput,
    "soak": _soak,
    "day": _day,
}


if __name__ == "__main__":
    sys.exit(main())
