"""What the launchers know without a GPU: enough tiles for any plan, and no Triton on import."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from moe_server.kernels.gpu.tiles import num_row_tiles

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("tile_rows", [2, 3, 16])
def test_there_are_as_many_tiles_as_the_worst_plan_needs(num_experts, tile_rows):
    worst: dict[int, int] = {}
    for counts in itertools.product(range(20), repeat=num_experts):
        needed = sum(-(-count // tile_rows) for count in counts)
        worst[sum(counts)] = max(worst.get(sum(counts), 0), needed)
    for num_picks in range(1, 20):
        assert num_row_tiles(num_picks, num_experts, tile_rows) == worst[num_picks]


def test_launchers_are_imported_without_triton():
    names = [file.stem for file in sorted((ROOT / "kernels/gpu").glob("*.py"))]
    assert {"routing", "experts", "combine"} <= set(names)
    imports = "; ".join(f"import moe_server.kernels.gpu.{name}" for name in names)
    code = f"import sys, torch; sys.modules['triton'] = None; {imports}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
