"""The engine process around the model: what it costs and how it fails.

    make bench-engine [QUICK=1] [ARGS="--repetitions 1"]

So far: `restart/ready`, the seconds until a server whose engine was killed under load is READY
again, over those of its first start from a cold disk (`engine_restart`): on two layers of Mixtral
8x7B's size, half of whose experts have a place. Files are kept in $MOE_BENCH_DIR (default
/var/tmp/moe-bench); models take at most $MOE_BENCH_MAX_GB (default 45) there.

Prints a table and one JSON line; unless QUICK, it is kept in benchmarks/results/. Needs root, to
drop the page cache.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import ceilings, checkout, engine_restart, kernels
from benchmarks.models import ModelFolder
from benchmarks.paging import FOLDER, MAX_GB
from moe_server.budget import usable_cores

MODEL = "bf16-2"
REPETITIONS = 3
READY = "restart/ready"
AT_MOST = {READY: 0.25}


def main() -> int:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an answer within 5 minutes")
    parser.add_argument("--repetitions", type=int)
    args = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("nothing to measure: dropping the page cache needs root")
    folder = Path(os.environ.get("MOE_BENCH_DIR", FOLDER))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    limit_bytes = round(float(os.environ.get("MOE_BENCH_MAX_GB", MAX_GB)) * 1e9)
    models = ModelFolder(folder / "models", limit_bytes, lambda: Path(sys.executable))
    model = models.require(MODEL)
    restarts, disk = [], []
    for number in range(args.repetitions or (1 if args.quick else REPETITIONS)):
        disk.append(ceilings.disk_bytes_per_s(sorted(model.glob("*.safetensors")), 2**28))
        restart = engine_restart.measure(model, folder)
        restarts.append(restart)
        print(
            f"{number}: READY after {restart.first_ready_s:.1f} s, again "
            f"{restart.ready_again_s:.1f} s after the kill ({restart.ratio:.2f}), "
            f"{restart.read_bytes / 1e9:.1f} GB read; {restart.streams_told_to_retry} of "
            f"{engine_restart.NUM_STREAMS} streams told to retry; disk {disk[-1] / 1e9:.2f} GB/s"
        )
    ratios = {READY: engine_restart.ratio(restarts)}
    for key, ratio in ratios.items():
        verdict = "met" if ratio <= AT_MOST[key] else "missed"
        print(f"{key:20} {ratio:6.3f}  <= {AT_MOST[key]} {verdict}")
    line = {
        "bench": "engine",
        "commit": checkout.commit(),
        "hardware": kernels.hardware(usable_cores()),
        "ceilings": {"disk_bytes_per_s": statistics.median(disk)},
        "results": {"restart": [asdict(restart) for restart in restarts]},
        "ratios": ratios,
    }
    if not args.quick:
        checkout.RESULTS.mkdir(exist_ok=True)
        kept = checkout.RESULTS / f"engine-{line['commit']}.json"
        kept.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
