"""The last step of `benchmarks/gpu.sh`: what its parts left behind, as a table and one JSON line.

    python -m benchmarks.gpu_report OUT_DIR

Works with whatever is there: a part that failed has a status and the end of its log, no figures.
Imports no torch, which may be what failed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import checkout

PARTS = ("machine", "rates", "numerics", "routing", "int4", "bf16")
TAIL_LINES = 5
_GPU = re.compile(r"NVIDIA [A-Z]\w*[^|]*?(?=\s{2,}|\s*\|)")


def main() -> int:
    """Collects and prints; 1 if a part is missing or did not end well."""
    out = Path(sys.argv[1])
    statuses = {part: status_of(out, part) for part in PARTS}
    results = {part: figures(out / f"{part}.log") for part in PARTS}
    for part in PARTS:
        print(f"{part:>10}  {statuses[part]}")
        if statuses[part] != "ok":
            for line in tail(out / f"{part}.log"):
                print(f"{'':>10}  | {line}")
        for name, value in flat(results[part]):
            print(f"{'':>10}  {name:<44} {value:>12}")
    line = {
        "bench": "gpu",
        "commit": checkout.commit(),
        "hardware": gpu_name(out / "machine.log"),
        "ceilings": {name: value for name, value in results["rates"].items() if "/" not in name},
        "status": statuses,
        "results": {part: found for part, found in results.items() if found},
        "ratios": {
            name: value for name, value in results["rates"].items() if name.endswith("of_memory")
        },
    }
    (out / "gpu.json").write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(line))
    return 0 if set(statuses.values()) == {"ok"} else 1


def status_of(out: Path, part: str) -> str:
    """ok, how it failed, or that it was not run."""
    file = out / f"{part}.status"
    return file.read_text(encoding="utf-8").strip() if file.exists() else "not run"


def figures(log: Path) -> dict[str, Any]:
    """The last line of a log that is a JSON object; empty without one."""
    if not log.exists():
        return {}
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
    return {}


def tail(log: Path) -> list[str]:
    """The end of a log, for people."""
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Numbers of a nested object, by path."""
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            rows.append((prefix + name, f"{value:,.3f}"))
    return rows


def gpu_name(log: Path) -> str:
    """As nvidia-smi says it; empty without a GPU."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = _GPU.search(text)
    return found.group().strip() if found else ""


if __name__ == "__main__":
    sys.exit(main())
