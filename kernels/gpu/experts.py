"""Experts in slots over the picks of a batch, on a GPU: two launches for all experts at once.

The programs (`programs/experts.py`) see a table of slots: what is not in one they leave alone. So a
layer may be computed in passes, those at hand first and what has arrived since later, with tables
that complement each other. Triton is imported when something is computed. Shape legend: T tokens,
H hidden size, I intermediate size, E experts, P picks.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.gpu.routing import DevicePlan
from moe_server.kernels.gpu.tiles import (
    FORMATS,
    ExpertTile,
    down_tiles,
    expert_tile,
    gate_up_tiles,
    num_row_tiles,
)

_MAX_MATRIX_BYTES = 2**31
"""Offsets within a record are 32 bits; slots are 64."""
_ALIGN_BYTES = 16
"""Of matrices, for 128-bit loads."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where an expert's matrices are in its slot, as in its record."""

    w13: MatrixLayout
    """w1 (I, H), at byte 0, and w3."""
    w2: MatrixLayout
    """(H, I)."""
    w3_offset: int
    w2_offset: int
    stride_bytes: int
    """From one slot to the next."""

    def __post_init__(self) -> None:
        assert self.w13.format is self.w2.format
        assert self.w13.format in FORMATS
        assert self.w13.columns == self.w2.rows
        assert self.w13.rows == self.w2.columns
        assert self.w3_offset + self.w13.nbytes <= _MAX_MATRIX_BYTES
        assert self.w2.nbytes <= _MAX_MATRIX_BYTES


def grouped_swiglu(
    x_TH: torch.Tensor,
    plan: DevicePlan,
    slots_E: torch.Tensor,
    arena: torch.Tensor,
    layout: SlotLayout,
    outputs_PH: torch.Tensor,
    hidden_PI: torch.Tensor | None = None,
) -> torch.Tensor:
    """w2 @ (silu(w1 @ x) * (w3 @ x)) for every pick whose expert is in a slot.

    Weights count as what they stand for, without rounding; sums are float32; the product of gate
    and up is rounded to bfloat16, and so is the result.

    Args:
        x_TH: bfloat16 (T, H).
        plan: Of the batch, by `route`.
        slots_E: int32 (E,): the slot of each expert, -1 for one that this pass leaves alone.
        arena: uint8, slots one behind the other; its address a multiple of 16.
        layout: Of a slot.
        outputs_PH: bfloat16 (P, H), row `token * K + choice`: rows of the pass's experts are
            written, the others keep what they hold.
        hidden_PI: Room for bfloat16 (P, I), contents of no use to anybody; None: is allocated.

    Returns:
        `outputs_PH`.
    """
    from moe_server.kernels.gpu.programs import experts as programs  # noqa: PLC0415

    num_picks, hidden_size = outputs_PH.shape
    num_experts = slots_E.shape[0]
    assert x_TH.dtype is outputs_PH.dtype is torch.bfloat16
    assert slots_E.dtype is torch.int32
    assert arena.dtype is torch.uint8
    assert x_TH.shape[1] == hidden_size == layout.w13.columns
    assert num_picks == plan.order.shape[0]
    assert num_picks % x_TH.shape[0] == 0
    assert plan.offsets.shape[0] == num_experts + 1
    assert all(one.is_contiguous() for one in (x_TH, outputs_PH, slots_E, arena))
    assert arena.data_ptr() % _ALIGN_BYTES == 0
    if hidden_PI is None:
        hidden_PI = outputs_PH.new_empty(num_picks, layout.w13.rows)
    assert hidden_PI.shape == (num_picks, layout.w13.rows)
    assert hidden_PI.is_contiguous()
    tile = expert_tile(gate_up_tiles(layout.w13), num_picks, num_experts)
    programs.gate_up[_grid(num_picks, num_experts, tile, 2 * layout.w13.rows)](
        x_TH, plan.order, plan.offsets, slots_E, arena, hidden_PI,
        **gate_up_constants(layout, num_experts, num_picks // x_TH.shape[0], tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = expert_tile(down_tiles(layout.w2), num_picks, num_experts)
    programs.down[_grid(num_picks, num_experts, tile, layout.w2.rows)](
        hidden_PI, plan.order, plan.offsets, slots_E, arena, outputs_PH,
        **down_constants(layout, num_experts, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return outputs_PH


@functools.cache
def gate_up_constants(
    layout: SlotLayout, num_experts: int, top_k: int, tile: ExpertTile
) -> dict[str, Any]:
    """What `gate_up` is compiled for."""
    return {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "STRIDE_BYTES": layout.stride_bytes,
        "W3_OFFSET": layout.w3_offset,
        **_matrix_constants(layout.w13, tile),
    }


@functools.cache
def down_constants(layout: SlotLayout, num_experts: int, tile: ExpertTile) -> dict[str, Any]:
    """What `down` is compiled for."""
    return {
        "NUM_EXPERTS": num_experts,
        "STRIDE_BYTES": layout.stride_bytes,
        "W2_OFFSET": layout.w2_offset,
        **_matrix_constants(layout.w2, tile),
    }


def _matrix_constants(matrix: MatrixLayout, tile: ExpertTile) -> dict[str, Any]:
    return {
        "FORMAT": matrix.format.value,
        "ROWS": matrix.rows,
        "COLUMNS": matrix.columns,
        "BLOCK_BYTES": matrix.block_bytes,
        "SCALES_OFFSET": matrix.scales_offset if matrix.format.is_integer else 0,
        "ZEROS_OFFSET": matrix.zeros_offset if matrix.format is WeightFormat.INT4 else 0,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.step_columns(matrix),
    }


def _grid(num_picks: int, num_experts: int, tile: ExpertTile, rows: int) -> tuple[int, int]:
    return num_row_tiles(num_picks, num_experts, tile.rows), -(-rows // tile.outputs)
