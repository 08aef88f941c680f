"""Which tiles each program is launched with: tables, chosen from sizes that the host knows.

No search at run time: a server must not measure while it serves, and every row here is compiled and
judged by `benchmarks/cubins.py`. Imports no Triton.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

from moe_server.kernels.formats import MatrixLayout, WeightFormat

FORMATS = (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)
"""What the expert programs compute with."""
MAX_EXPERTS = 64
"""Experts of a layer that the routing programs have tiles for."""


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """What one program of an expert's product computes."""

    rows: int
    """Rows of activations."""
    outputs: int
    """Rows of the matrix; of `gate_up`, half of them w1's and half w3's."""
    columns: int
    """Of both, per step. In int4, those of a group."""
    num_warps: int
    num_stages: int
    """Steps whose loads are under way at a time, one of them being computed."""

    def step_columns(self, matrix: MatrixLayout) -> int:
        """Columns of a step: whole steps are what the stored columns divide into."""
        if matrix.format is WeightFormat.INT8:
            return math.gcd(self.columns, matrix.padded_columns)
        assert matrix.format is WeightFormat.BFLOAT16 or self.columns == matrix.group_columns
        return self.columns


Tiles: TypeAlias = tuple[ExpertTile, ...]
"""By rows."""

# Few rows: the memory is the limit, so narrow tiles, to have programs for all processors, and many
# loads under way. Many rows: as much use of dequantised weights as registers allow on sm_80.
_GATE_UP: dict[WeightFormat, Tiles] = {
    WeightFormat.BFLOAT16: (
        ExpertTile(16, 64, 128, num_warps=4, num_stages=4),
        ExpertTile(64, 128, 64, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    WeightFormat.INT8: (
        ExpertTile(16, 64, 128, num_warps=4, num_stages=4),
        ExpertTile(64, 64, 128, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
}
_DOWN: dict[WeightFormat, Tiles] = {
    WeightFormat.BFLOAT16: (
        ExpertTile(16, 32, 128, num_warps=4, num_stages=5),
        ExpertTile(64, 128, 64, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    WeightFormat.INT8: (
        ExpertTile(16, 32, 128, num_warps=4, num_stages=5),
        ExpertTile(64, 64, 128, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
}
# By columns of a group. Narrow groups have fewer bytes to a step: fewer warps fetch them, or they
# could not take 16 bytes a thread.
_GATE_UP_INT4: dict[int, Tiles] = {
    128: (
        ExpertTile(16, 64, 128, num_warps=4, num_stages=5),
        ExpertTile(64, 64, 128, num_warps=4, num_stages=3),
        ExpertTile(128, 64, 128, num_warps=8, num_stages=3),
    ),
    64: (
        ExpertTile(16, 64, 64, num_warps=4, num_stages=6),
        ExpertTile(64, 64, 64, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    32: (
        ExpertTile(16, 64, 32, num_warps=2, num_stages=6),
        ExpertTile(64, 128, 32, num_warps=4, num_stages=3),
    ),
}
_DOWN_INT4: dict[int, Tiles] = {
    128: (
        ExpertTile(16, 32, 128, num_warps=4, num_stages=6),
        ExpertTile(64, 64, 128, num_warps=4, num_stages=3),
        ExpertTile(128, 64, 128, num_warps=8, num_stages=3),
    ),
    64: (
        ExpertTile(16, 32, 64, num_warps=2, num_stages=6),
        ExpertTile(64, 64, 64, num_warps=4, num_stages=3),
        ExpertTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    32: (
        ExpertTile(16, 64, 32, num_warps=2, num_stages=6),
        ExpertTile(64, 128, 32, num_warps=4, num_stages=3),
    ),
}


def gate_up_tiles(w13: MatrixLayout) -> Tiles:
    """Tiles of the product with w1 and w3."""
    is_int4 = w13.format is WeightFormat.INT4
    return _GATE_UP_INT4[w13.group_columns] if is_int4 else _GATE_UP[w13.format]


def down_tiles(w2: MatrixLayout) -> Tiles:
    """Tiles of the product with w2."""
    is_int4 = w2.format is WeightFormat.INT4
    return _DOWN_INT4[w2.group_columns] if is_int4 else _DOWN[w2.format]


def expert_tile(tiles: Tiles, num_picks: int, num_experts: int) -> ExpertTile:
    """The smallest tile that holds twice the rows of a mean expert, else the largest.

    How many rows each expert really has is known to the device only.
    """
    for tile in tiles:
        if 2 * num_picks <= tile.rows * num_experts:
            return tile
    return tiles[-1]


def num_row_tiles(num_picks: int, num_experts: int, tile_rows: int) -> int:
    """How many tiles the rows of all experts can need, whoever has them."""
    return (num_picks + min(num_experts, num_picks) * (tile_rows - 1)) // tile_rows


@dataclass(frozen=True, slots=True)
class RouterTile:
    """What one program of the router computes: `tokens` tokens for all experts."""

    tokens: int
    columns: int
    """Of a part, per step."""
    parts: int
    """A step's columns are summed in so many parts side by side, as one warp's products would wait
    for each other."""
    num_warps: int
    num_stages: int


_ROUTER_TILES = (
    (16, RouterTile(16, 64, parts=8, num_warps=8, num_stages=3)),
    (MAX_EXPERTS, RouterTile(16, 64, parts=2, num_warps=8, num_stages=3)),
)
PLACE_TILES_AT_ONCE = 128
PLACE_WARPS = 4
COMBINE_COLUMNS = 1024
COMBINE_WARPS = 4


def router_tile(num_experts: int) -> RouterTile:
    """The tile for so many experts, MAX_EXPERTS at most."""
    assert num_experts <= MAX_EXPERTS
    return next(tile for most, tile in _ROUTER_TILES if num_experts <= most)
