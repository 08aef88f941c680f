"""Dense matrices in int8: what `nn.Linear` and `nn.Embedding` do with them.

Imports nothing of ours outside kernels. Shape legend: N rows of the matrix, K columns.
"""

import torch

from moe_server.kernels.formats import BLOCK_ROWS, MatrixLayout
from moe_server.kernels.packing import INT8_ZERO
from moe_server.kernels.products import are_compiled, linear, prepare
from moe_server.kernels.quantised import linear_by_dequantising


def int8_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    layout: MatrixLayout,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product x @ W.T, plus a bias; rounded once.

    Args:
        x: (..., K) in a float dtype.
        weights: uint8 (layout.nbytes,).
        layout: W (N, K).
        bias_N: In a float dtype; None: there is none.

    Returns:
        (..., N) in the dtype of `x`.
    """
    rows_MK = x.reshape(-1, layout.columns)
    out_MN = torch.empty(len(rows_MK), layout.rows)
    if are_compiled(layout.format):
        linear(prepare(rows_MK, layout), weights, layout, out_MN)
    else:
        linear_by_dequantising(rows_MK, weights, layout, out_MN)
    if bias_N is not None:
        out_MN += bias_N.float()
    return out_MN.to(x.dtype).view(*x.shape[:-1], layout.rows)


def int8_embedding(
    ids: torch.Tensor, weights: torch.Tensor, layout: MatrixLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of W.

    Args:
        ids: Integers (...) in [0, N).
        weights: uint8 (layout.nbytes,).
        layout: W (N, K).
        dtype: Of the result.

    Returns:
        (..., K).
    """
    blocks = weights.view(layout.num_blocks, layout.block_bytes)
    codes = blocks[:, : layout.scales_offset]
    quads = codes.view(layout.num_blocks, layout.padded_columns // 4, BLOCK_ROWS, 4)
    scales = blocks.view(torch.float32)[:, layout.scales_offset // 4 :]
    flat = ids.flatten()
    block, lane = flat // BLOCK_ROWS, flat % BLOCK_ROWS
    chosen = quads[block, :, lane].reshape(len(flat), -1)[:, : layout.columns]
    rows: torch.Tensor = (chosen.float() - INT8_ZERO) * scales[block, lane][:, None]
    return rows.to(dtype).view(*ids.shape, layout.columns)
