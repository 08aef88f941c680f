"""Which commit a result belongs to, and where it is kept. Every benchmark's report asks it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def commit() -> str:
    """The checkout's commit, with "-dirty" behind it if files differ; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
