"""The program that sums experts' outputs; `kernels/gpu/combine.py` launches it.

Shape legend: K choices (padded to a power of two), H columns of a tile.
"""

import triton
import triton.language as tl

from moe_server.kernels.gpu.programs.arithmetic import to_bfloat16


@triton.jit
def combine_tokens(
    outputs,
    ids,
    weights,
    total,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """total[t] = sum over choices of weights[t, k] * outputs[t * TOP_K + k], by ascending expert.

    Axis 0 of the grid is tokens, axis 1 tiles of columns.

    Args:
        outputs: bfloat16 (tokens * TOP_K, HIDDEN).
        ids: int64 (tokens, TOP_K), different ones in a row.
        weights: float32 (tokens, TOP_K).
        total: bfloat16 (tokens, HIDDEN).
    """
    PADDED: tl.constexpr = triton.next_power_of_2(TOP_K)
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = column < HIDDEN
    choice_K = tl.arange(0, PADDED)
    at_K = token * TOP_K + choice_K
    id_K = tl.load(ids + at_K, mask=choice_K < TOP_K, other=2**31 - 1).to(tl.int32)
    weight_K = tl.load(weights + at_K, mask=choice_K < TOP_K, other=0.0)
    total_H = tl.zeros((BLOCK_H,), tl.float32)
    for _ in tl.static_range(TOP_K):
        is_next_K = id_K == tl.min(id_K, 0)
        choice = tl.min(tl.where(is_next_K, choice_K, PADDED), 0)
        weight = tl.sum(tl.where(is_next_K, weight_K, 0.0), 0)
        id_K = tl.where(is_next_K, 2**31 - 1, id_K)
        row = outputs + (token * TOP_K + choice).to(tl.int64) * HIDDEN
        output_H = tl.load(row + column, mask=is_column, other=0.0).to(tl.float32)
        # Both are rounded, as torch does it: bits are equal to those of the CPU's sum.
        product_H = to_bfloat16(output_H * weight).to(tl.float32)
        total_H = to_bfloat16(total_H + product_H).to(tl.float32)
    tl.store(total + token.to(tl.int64) * HIDDEN + column, to_bfloat16(total_H), mask=is_column)
