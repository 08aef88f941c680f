"""What packed integers mean, in torch: the reference of the kernels, and their stand-in.

Machines without the compiled kernels compute with these weights: slow and correct. `pack` measures
what quantisation has cost with them. Shape legend: M rows of activations, N rows, K columns.
"""

import torch
import torch.nn.functional as F

from moe_server.kernels.formats import BLOCK_ROWS, MatrixLayout, WeightFormat
from moe_server.kernels.packing import INT8_ZERO

_BLOCKS_AT_ONCE = 4
"""Blocks that `linear_by_dequantising` holds in float32: 3.5 MiB of 14,336 columns."""


def dequantise(
    weights: torch.Tensor,
    layout: MatrixLayout,
    *,
    first_block: int = 0,
    num_blocks: int | None = None,
) -> torch.Tensor:
    """The float32 weights of whole blocks of an int8 or int4 matrix.

    Args:
        weights: uint8 (layout.nbytes,).
        layout: The matrix.
        first_block: The first block wanted.
        num_blocks: How many; all that follow if None.

    Returns:
        float32 (N, K): the rows of those blocks.
    """
    assert layout.format.is_integer
    last_block = layout.num_blocks if num_blocks is None else first_block + num_blocks
    blocks = weights.view(layout.num_blocks, layout.block_bytes)[first_block:last_block]
    num_blocks = blocks.shape[0]
    if layout.format is WeightFormat.INT8:
        quads = blocks[:, : layout.scales_offset].reshape(num_blocks, -1, BLOCK_ROWS, 4)
        codes = quads.transpose(1, 2).reshape(num_blocks, BLOCK_ROWS, -1)
        scale_bytes = blocks[:, layout.scales_offset :].contiguous()
        scale = scale_bytes.view(torch.float32).view(num_blocks, BLOCK_ROWS, 1)
        values = (codes.float() - INT8_ZERO) * scale
    else:
        pairs = blocks[:, : layout.scales_offset].reshape(num_blocks, -1, BLOCK_ROWS, 4)
        halves = torch.stack((pairs & 15, pairs >> 4), dim=2)
        # (block, step, half, row, column) -> (block, row, step, half, column)
        codes = halves.permute(0, 3, 1, 2, 4).reshape(num_blocks, BLOCK_ROWS, layout.num_groups, -1)
        scale_bytes = blocks[:, layout.scales_offset : layout.zeros_offset].contiguous()
        scale = scale_bytes.view(torch.bfloat16).view(num_blocks, -1, BLOCK_ROWS).transpose(1, 2)
        zeros_end = layout.zeros_offset + layout.num_groups * BLOCK_ROWS
        zero = blocks[:, layout.zeros_offset : zeros_end].reshape(num_blocks, -1, BLOCK_ROWS)
        centred = codes.float() - zero.transpose(1, 2).float()[..., None]
        values = centred * scale.float()[..., None]
    rows = values.view(num_blocks * BLOCK_ROWS, layout.padded_columns)
    num_rows = min(layout.rows, last_block * BLOCK_ROWS) - first_block * BLOCK_ROWS
    return rows[:num_rows, : layout.columns]


def linear_by_dequantising(
    x_MK: torch.Tensor, weights: torch.Tensor, layout: MatrixLayout, out_MN: torch.Tensor
) -> None:
    """Writes x @ W.T to `out_MN`, in float32 and a few row blocks at a time."""
    x = x_MK.float()
    for first in range(0, layout.num_blocks, _BLOCKS_AT_ONCE):
        count = min(_BLOCKS_AT_ONCE, layout.num_blocks - first)
        w = dequantise(weights, layout, first_block=first, num_blocks=count)
        rows = slice(first * BLOCK_ROWS, first * BLOCK_ROWS + w.shape[0])
        out_MN[:, rows] = F.linear(x, w).to(out_MN.dtype)
