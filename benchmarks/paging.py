"""Experts that do not fit: our engine and its peers on the same work, machine and minutes.

    make bench-paging [QUICK=1] [FULL=1] [ARGS="--only bf16 --repetitions 1"]

The physics is in `limits.py`: bytes that a cache of that size must read, at the bandwidth that the
disk had beside the run. Every contender is a process of its own, within a memory cgroup where the
load has a cap, after the page cache was dropped; contenders take turns, repetition by repetition,
and the disk is probed between any two works. Bytes are those that the kernel counts for the
process, page faults included. Ratios are of neighbours in time.

QUICK takes a smaller model, less work, one repetition, and llama.cpp alone if it is installed. FULL
adds a 32-layer model of 4 bits, which needs 60 GB of disk, or half of that for contenders one after
the other. Files and environments are kept in $MOE_BENCH_DIR (default /var/tmp/moe-bench); models
take at most $MOE_BENCH_MAX_GB (default 45) there.

Prints a table and one JSON line; with every single run it is kept in benchmarks/results/.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import ceilings, checkout, summary
from benchmarks.bench import Bench
from benchmarks.child import can_cap
from benchmarks.contenders import OURS
from benchmarks.loads import FULL_LOADS, LOADS, QUICK_LOADS
from moe_server.budget import usable_cores

REPETITIONS = 3
FOLDER = "/var/tmp/moe-bench"  # noqa: S108  a cache: large, and kept over restarts
MAX_GB = "45"


def main() -> int:
    """Measures and reports; what was measured before Ctrl-C is reported, too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an answer within 5 minutes")
    parser.add_argument("--full", action="store_true", help="add the 32-layer model")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--only", default="", help="loads whose keys contain this text")
    args = parser.parse_args()
    loads = QUICK_LOADS if args.quick else (*LOADS, *(FULL_LOADS if args.full else ()))
    loads = tuple(load for load in loads if args.only in load.key("*"))
    if reason := can_cap():
        print(f"Only loads without a cap, from a warm page cache: {reason}.", file=sys.stderr)
        loads = tuple(load for load in loads if load.all_fits)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the former
        signal.signal(number, signal.default_int_handler)
    bench = Bench(
        Path(os.environ.get("MOE_BENCH_DIR", FOLDER)),
        round(float(os.environ.get("MOE_BENCH_MAX_GB", MAX_GB)) * 1e9),
        quick=args.quick,
    )
    interrupted = False
    try:
        bench.measure(loads, args.repetitions or (1 if args.quick else REPETITIONS))
    except KeyboardInterrupt:
        interrupted = True
    _report(bench)
    return 130 if interrupted else 0


def _report(bench: Bench) -> None:
    samples = summary.grouped(bench.samples)
    for row in summary.table(samples, OURS):
        print(row)
    for place, reason in bench.unavailable.items():
        print(f"no result: {place}: {reason}")
    commit = checkout.commit()
    probes = bench.disk_bytes_per_s or [0.0]
    found = summary.results(samples)
    line = {
        "bench": "paging",
        "commit": commit,
        "hardware": _hardware(),
        "ceilings": {
            "memory_bytes_per_s": ceilings.memory_bytes_per_s(),
            "disk_bytes_per_s": statistics.median(probes),
            "disk_bytes_per_s_range": [min(probes), max(probes)],
        },
        "results": found,
        "ratios": summary.ratios(samples, OURS),
        "unavailable": bench.unavailable,
    }
    checkout.RESULTS.mkdir(exist_ok=True)
    (checkout.RESULTS / f"paging-{commit}.json").write_text(json.dumps(line, indent=1) + "\n")
    for of_key in found.values():
        for result in of_key.values():
            del result["runs"]
    print(json.dumps(line))


def _hardware() -> dict[str, Any]:
    fields = {}
    for row in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        name, _, value = row.partition(":")
        fields[name.strip()] = value.strip()
    memory = Path("/proc/meminfo").read_text(encoding="ascii").split()[1]
    return {
        "cpu": fields.get("model name", platform.machine()),
        "flags": sorted(flag for flag in fields.get("flags", "").split() if "avx512" in flag),
        "cores": usable_cores(),
        "memory_bytes": int(memory) * 1024,
        "kernel": platform.release(),
    }


if __name__ == "__main__":
    sys.exit(main())
