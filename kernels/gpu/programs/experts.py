"""The two programs of a grouped SwiGLU over slots; `kernels/gpu/experts.py` launches them.

Axis 0 of the grid is tiles of rows, over all experts; axis 1 is tiles of the matrix's rows. Tiles
of one expert's rows are neighbours, so that the weights which they share come from L2. Shape
legend: M rows of a tile, N rows of the matrix, K columns of a step.
"""

import triton
import triton.language as tl

from moe_server.kernels.gpu.programs.arithmetic import to_bfloat16
from moe_server.kernels.gpu.programs.weights import BLOCK_ROWS, add_weighted, scaled


@triton.jit
def find_rows(offsets, tile, NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert whose rows a tile has, NUM_EXPERTS if none; the tile's first row; the last's end.

    Every program scans the offsets: an expert with n rows has n / BLOCK_M tiles, rounded up.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    experts = tl.arange(0, PADDED)
    is_expert = experts < NUM_EXPERTS
    begins = tl.load(offsets + experts, mask=is_expert, other=0)
    ends = tl.load(offsets + experts + 1, mask=is_expert, other=0)
    tile_ends = tl.cumsum((ends - begins + BLOCK_M - 1) // BLOCK_M, 0)
    is_before = (tile_ends <= tile) & is_expert
    expert = tl.sum(is_before.to(tl.int32), 0)
    tiles_before = tl.max(tl.where(is_before, tile_ends, 0), 0)
    begin = tl.sum(tl.where(experts == expert, begins, 0), 0)
    end = tl.sum(tl.where(experts == expert, ends, 0), 0)
    return expert, begin + (tile - tiles_before) * BLOCK_M, end


@triton.jit
def gate_up(
    x,
    order,
    offsets,
    slots,
    arena,
    hidden,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIDE_BYTES: tl.constexpr,
    W3_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    ZEROS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden[i] = silu(w1 @ x[order[i] // TOP_K]) * (w3 @ the same), for rows of experts in slots.

    Args:
        x: bfloat16 (tokens, COLUMNS).
        order: int64 (picks,).
        offsets: int32 (NUM_EXPERTS + 1,).
        slots: int32 (NUM_EXPERTS,).
        arena: uint8.
        hidden: bfloat16 (picks, ROWS), by place in `order`.
    """
    expert, first, end = find_rows(offsets, tl.program_id(0), NUM_EXPERTS, BLOCK_M)
    if expert == NUM_EXPERTS:
        return
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    pick = tl.load(order + row, mask=is_row, other=0).to(tl.int32)
    x_row = x + (pick // TOP_K).to(tl.int64)[:, None] * COLUMNS
    record = arena + slot.to(tl.int64) * STRIDE_BYTES
    # Blocks of both matrices by turns: block b of w1, block b of w3, b + 1 of w1, ... Each thread
    # then holds both halves of what it multiplies, and one product serves both.
    block = tl.program_id(1) * (BLOCK_N // (2 * BLOCK_ROWS))
    total_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, COLUMNS, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)[None, :]
        is_there = is_row[:, None]
        if COLUMNS % BLOCK_K:
            is_there = is_there & (column < COLUMNS)
        x_MK = tl.load(x_row + column, mask=is_there, other=0.0)
        total_MN = add_weighted(
            total_MN, x_MK, record, block, k, FORMAT, ROWS, COLUMNS, BLOCK_BYTES, SCALES_OFFSET,
            ZEROS_OFFSET, 2, W3_OFFSET, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    total_MN = scaled(
        total_MN, record, block, FORMAT, ROWS, BLOCK_BYTES, SCALES_OFFSET, 2, W3_OFFSET, BLOCK_N
    )
    turns = tl.reshape(total_MN, (BLOCK_M, BLOCK_N // (2 * BLOCK_ROWS), 2, BLOCK_ROWS))
    gate, up = tl.split(tl.permute(turns, (0, 1, 3, 2)))
    swiglu_MN = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (BLOCK_M, BLOCK_N // 2))
    out = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
    at = hidden + row.to(tl.int64)[:, None] * ROWS + out
    tl.store(at, to_bfloat16(swiglu_MN), mask=is_row[:, None] & (out < ROWS))


@triton.jit
def down(
    hidden,
    order,
    offsets,
    slots,
    arena,
    outputs,
    NUM_EXPERTS: tl.constexpr,
    STRIDE_BYTES: tl.constexpr,
    W2_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    ZEROS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """outputs[order[i]] = w2 @ hidden[i], for rows of experts in slots.

    Args:
        hidden: bfloat16 (picks, COLUMNS), by place in `order`.
        order: int64 (picks,).
        offsets: int32 (NUM_EXPERTS + 1,).
        slots: int32 (NUM_EXPERTS,).
        arena: uint8.
        outputs: bfloat16 (picks, ROWS), by pick.
    """
    expert, first, end = find_rows(offsets, tl.program_id(0), NUM_EXPERTS, BLOCK_M)
    if expert == NUM_EXPERTS:
        return
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    hidden_row = hidden + row.to(tl.int64)[:, None] * COLUMNS
    w2 = arena + slot.to(tl.int64) * STRIDE_BYTES + W2_OFFSET
    block = tl.program_id(1) * (BLOCK_N // BLOCK_ROWS)
    total_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, COLUMNS, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)[None, :]
        is_there = is_row[:, None]
        if COLUMNS % BLOCK_K:
            is_there = is_there & (column < COLUMNS)
        x_MK = tl.load(hidden_row + column, mask=is_there, other=0.0)
        total_MN = add_weighted(
            total_MN, x_MK, w2, block, k, FORMAT, ROWS, COLUMNS, BLOCK_BYTES, SCALES_OFFSET,
            ZEROS_OFFSET, 1, 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    total_MN = scaled(total_MN, w2, block, FORMAT, ROWS, BLOCK_BYTES, SCALES_OFFSET, 1, 0, BLOCK_N)
    pick = tl.load(order + row, mask=is_row, other=0)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    at = outputs + pick[:, None] * ROWS + out
    tl.store(at, to_bfloat16(total_MN), mask=is_row[:, None] & (out < ROWS))
