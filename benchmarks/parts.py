"""A benchmark of several parts: its arguments, its folder, what was found, and the report.

A part is a function that takes the report, measures, prints and notes. `engine` and `coldstart`
are such benchmarks; what they measure is theirs.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkout, kernels
from benchmarks.models import ModelFolder
from benchmarks.paging import FOLDER, MAX_GB
from moe_server.budget import usable_cores


class Report:
    """What the parts have found so far."""

    def __init__(
        self, folder: Path, models: ModelFolder, parts: Sequence[str], *, quick: bool
    ) -> None:
        self.folder, self.models, self.parts, self.quick = folder, models, parts, quick
        self.ceilings: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.ratios: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        """Parts that ended with an error, and which."""


Part = Callable[[Any, int | None], None]
"""Gets the benchmark's own Report and, if given, the number of repetitions."""


@dataclass(frozen=True)
class Benchmark:
    """What tells one from another in its report."""

    name: str
    parts: Sequence[str]
    at_least: Mapping[str, float]
    """The bars of ratios that should be large; others' are in `at_most`."""
    at_most: Mapping[str, float]

    def arguments(self, description: str, repeated: str) -> argparse.Namespace:
        """`quick`, `only` and `repetitions`, which are `repeated`."""
        parser = argparse.ArgumentParser(description=description.splitlines()[0])
        parser.add_argument("--quick", action="store_true", help="an answer within 5 minutes")
        parser.add_argument("--only", nargs="+", choices=list(self.parts), default=list(self.parts))
        parser.add_argument("--repetitions", type=int, help=repeated)
        return parser.parse_args()

    def run(self, parts: Mapping[str, Part], report: Report, repetitions: int | None) -> None:
        """Runs the report's parts; one that fails is noted, and the next one is run.

        Args:
            parts: By name.
            report: Which names its parts.
            repetitions: As `arguments` has it.
        """
        for name in report.parts:
            try:
                parts[name](report, repetitions)
            except Exception as error:  # noqa: BLE001  whatever it is: others' results are kept
                traceback.print_exc()
                report.failed[name] = repr(error)

    def tell(self, report: Report, draw: Callable[[Path], None]) -> int:
        """Prints ratios beside their bars, and the JSON line, which is kept unless quick.

        Args:
            report: Of the parts that were run.
            draw: Makes the picture of it, if there is one, in a file of this name.

        Returns:
            An exit code: 1 where a part failed.
        """
        for key, ratio in report.ratios.items():
            is_least = key in self.at_least
            sign, bar = (">=", self.at_least[key]) if is_least else ("<=", self.at_most[key])
            met = ratio >= bar if is_least else ratio <= bar
            print(f"{key:20} {ratio:7.3f}  {sign} {bar} {'met' if met else 'missed'}")
        line = {
            "bench": self.name,
            "commit": checkout.commit(),
            "hardware": kernels.hardware(usable_cores()),
            "ceilings": report.ceilings,
            "results": report.results,
            "ratios": report.ratios,
        }
        if report.failed:
            line["failed"] = report.failed
        kept = report.folder / f"{self.name}-quick.json"
        done = [name for name in report.parts if name not in report.failed]
        if done and not report.quick:
            checkout.RESULTS.mkdir(exist_ok=True)
            some = "" if set(done) == set(self.parts) else "".join(f"-{name}" for name in done)
            kept = checkout.RESULTS / f"{self.name}{some}-{line['commit']}.json"
            kept.write_text(json.dumps(line, indent=1) + "\n")
        draw(kept.with_suffix(".png"))
        for name, error in report.failed.items():
            print(f"FAILED, its results are missing: {name}: {error}")
        print(json.dumps(line))
        return 1 if report.failed else 0


def open_folder() -> tuple[Path, ModelFolder]:
    """Where a benchmark keeps its files, and the models there."""
    folder = Path(os.environ.get("MOE_BENCH_DIR", FOLDER))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    limit_bytes = round(float(os.environ.get("MOE_BENCH_MAX_GB", MAX_GB)) * 1e9)
    return folder, ModelFolder(folder / "models", limit_bytes, lambda: Path(sys.executable))
