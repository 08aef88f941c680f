"""Integer codes into the interleaved bytes of `formats.py`.

Places codes, scales and zero points that somebody else has chosen; `quantised.py` reads them back.
Works on ranges of whole row blocks, so that a matrix is packed piece by piece: the pieces' bytes
one behind the other are the matrix. Shape legend: N rows of the range, K columns, G groups.
"""

import torch
import torch.nn.functional as F

from moe_server.kernels.formats import BLOCK_ROWS, MatrixLayout, WeightFormat

INT8_ZERO = 128
"""The code of zero in int8."""


def pack_int8(codes_NK: torch.Tensor, scale_N: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    """Bytes of rows in int8: W[n, k] = (codes[n, k] - 128) * scale[n].

    Args:
        codes_NK: uint8 (N, K): rows of a range that begins with a block. Unless it ends with the
            matrix, N is a multiple of 16.
        scale_N: float32 (N,).
        layout: The whole matrix; of its rows only those given count.

    Returns:
        uint8 (number of blocks * layout.block_bytes,).
    """
    assert layout.format is WeightFormat.INT8
    assert scale_N.dtype is torch.float32
    assert scale_N.shape == codes_NK.shape[:1]
    codes = _to_blocks(codes_NK, layout, fill=INT8_ZERO)
    num_blocks = codes.shape[0]
    blocks = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
    # (block, row, quad, column) -> (block, quad, row, column)
    quads = codes.view(num_blocks, BLOCK_ROWS, -1, 4).transpose(1, 2)
    blocks[:, : layout.scales_offset] = quads.reshape(num_blocks, -1)
    scales = _pad_rows(scale_N).view(num_blocks, BLOCK_ROWS)
    blocks[:, layout.scales_offset :] = scales.view(torch.uint8)
    return blocks.flatten()


def pack_int4(
    codes_NK: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor, layout: MatrixLayout
) -> torch.Tensor:
    """Bytes of rows in int4: W[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g = k // group.

    Args:
        codes_NK: uint8 (N, K) in 0..15: a range of rows as for `pack_int8`.
        scale_NG: bfloat16 (N, G).
        zero_NG: uint8 (N, G) in 0..15.
        layout: The whole matrix; of its rows only those given count.

    Returns:
        uint8 (number of blocks * layout.block_bytes,).
    """
    assert layout.format is WeightFormat.INT4
    assert scale_NG.dtype is torch.bfloat16
    assert zero_NG.dtype is torch.uint8
    assert scale_NG.shape == zero_NG.shape == (codes_NK.shape[0], layout.num_groups)
    codes = _to_blocks(codes_NK, layout, fill=0)
    num_blocks = codes.shape[0]
    num_padding = layout.padded_columns - layout.columns
    if num_padding:
        # Weights of zero: the code is the last group's zero point.
        codes[:, :, layout.columns :] = _pad_rows(zero_NG[:, -1]).view(num_blocks, BLOCK_ROWS, 1)
    blocks = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
    # (block, row, step, half, column): both halves of a step share a byte.
    halves = codes.view(num_blocks, BLOCK_ROWS, -1, 2, 4)
    pairs = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    blocks[:, : layout.scales_offset] = pairs.transpose(1, 2).reshape(num_blocks, -1)
    scales = _by_group(scale_NG).view(torch.uint8).view(num_blocks, -1)
    blocks[:, layout.scales_offset : layout.zeros_offset] = scales
    zeros = _by_group(zero_NG).view(num_blocks, -1)
    blocks[:, layout.zeros_offset : layout.zeros_offset + zeros.shape[1]] = zeros
    return blocks.flatten()


def _to_blocks(codes_NK: torch.Tensor, layout: MatrixLayout, *, fill: int) -> torch.Tensor:
    """(blocks, 16, K_padded), `fill` where there is no weight."""
    assert codes_NK.dtype is torch.uint8
    num_rows, columns = codes_NK.shape
    assert columns == layout.columns
    assert num_rows <= layout.rows
    padding = (0, layout.padded_columns - columns, 0, -num_rows % BLOCK_ROWS)
    padded = F.pad(codes_NK, padding, value=fill)
    return padded.view(-1, BLOCK_ROWS, layout.padded_columns)


def _pad_rows(values: torch.Tensor) -> torch.Tensor:
    """Zeros behind the last row, to whole blocks; rows come first."""
    padding = values.new_zeros(-values.shape[0] % BLOCK_ROWS, *values.shape[1:])
    return torch.cat((values, padding))


def _by_group(values_NG: torch.Tensor) -> torch.Tensor:
    """(N, G) -> contiguous (blocks, G, 16)."""
    padded = _pad_rows(values_NG)
    return padded.view(-1, BLOCK_ROWS, padded.shape[1]).transpose(1, 2).contiguous()
