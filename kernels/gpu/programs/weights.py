"""Tiles of a weight matrix, in every format of `kernels/formats.py`.

The integer formats are read as the CPU's kernels read them: a tile is whole row blocks, of which
each holds its columns of this step in one contiguous run, so that 128-bit loads need no other
layout than the one on disk. Codes less their zero are small integers, exact in bfloat16: they are
multiplied as they are and the scales are applied to the sums. Shape legend: M rows of activations,
N rows of the matrix, K columns of a step, B blocks of 16 rows.
"""

import triton
import triton.language as tl

from moe_server.kernels.gpu.programs.arithmetic import INTERPRETED, add_product

BLOCK_ROWS = tl.constexpr(16)
# 2^23 as a float32 has its last bit worth one: a byte below it is that byte as a number.
INTEGER_BITS = tl.constexpr(0x4B000000)
INTEGER_BASE = tl.constexpr(8388608.0)
HALF_INTEGER_BITS = tl.constexpr(0x4300)


@triton.jit
def to_number(code):
    """A byte as a float32: conversion instructions have a quarter of this one's speed."""
    return (code.to(tl.uint32) | INTEGER_BITS).to(tl.float32, bitcast=True)


@triton.jit
def centred(codes_KN, zero_N):
    """(K, N): codes less the zero of their row, -15 to 15 and exact, in bfloat16."""
    if INTERPRETED:
        return (to_number(codes_KN) - to_number(zero_N)[None, :]).to(tl.bfloat16)
    else:  # noqa: RET505  a branch not taken must not be compiled
        # As in `to_number`, two at a time: 2^7 has its last bit worth one in bfloat16.
        codes = (codes_KN.to(tl.uint16) | HALF_INTEGER_BITS).to(tl.bfloat16, bitcast=True)
        zero = (zero_N.to(tl.uint16) | HALF_INTEGER_BITS).to(tl.bfloat16, bitcast=True)
        return codes - zero[None, :]


@triton.jit
def add_weighted(
    total_MN,
    x_MK,
    matrix,
    first_block,
    first_column,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    ZEROS_OFFSET: tl.constexpr,
    TURNS: tl.constexpr,
    TURN_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds one step's columns to the sums; those of int8 still want what `scaled` does.

    Args:
        total_MN: float32.
        x_MK: bfloat16.
        matrix: The first of TURNS equal matrices, TURN_BYTES apart. A tile takes its blocks from
            them by turns.
        first_block: First row of the tile in each matrix, in blocks of 16 rows.
        first_column: Of the step. A step of int4 is one group.
    """
    # Row numbers are made by arithmetic alone: behind a reshape the compiler no longer knows how
    # they are aligned.
    turn_N = tl.arange(0, BLOCK_N) // BLOCK_ROWS
    block_N = first_block + turn_N // TURNS
    lane_N = tl.arange(0, BLOCK_N) % BLOCK_ROWS
    is_row_N = block_N * BLOCK_ROWS + lane_N < ROWS
    of_matrix_N = matrix + turn_N % TURNS * TURN_BYTES
    if FORMAT == "bfloat16":
        column_K = first_column + tl.arange(0, BLOCK_K)
        row_N = block_N * BLOCK_ROWS + lane_N
        of_row_N = of_matrix_N.to(tl.pointer_type(tl.bfloat16)) + row_N * COLUMNS
        is_there = is_row_N[None, :]
        if COLUMNS % BLOCK_K:
            is_there = is_there & (column_K[:, None] < COLUMNS)
        w_KN = tl.load(of_row_N[None, :] + column_K[:, None], mask=is_there, other=0.0)
        total_MN = add_product(total_MN, x_MK, w_KN)
    else:
        BLOCKS: tl.constexpr = BLOCK_N // BLOCK_ROWS
        turn_B = tl.arange(0, BLOCKS)
        block_B = first_block + turn_B // TURNS
        is_block = block_B[:, None] * BLOCK_ROWS < ROWS
        of_block_B = matrix + turn_B % TURNS * TURN_BYTES + block_B * BLOCK_BYTES
        if FORMAT == "int8":
            run = first_column * BLOCK_ROWS + tl.arange(0, BLOCK_K * BLOCK_ROWS)
            codes = tl.load(of_block_B[:, None] + run[None, :], mask=is_block, other=0)
            quads = tl.reshape(codes, (BLOCKS, BLOCK_K // 4, BLOCK_ROWS, 4))
            codes_KN = tl.reshape(tl.permute(quads, (1, 3, 0, 2)), (BLOCK_K, BLOCK_N))
            w_KN = (to_number(codes_KN) - (INTEGER_BASE + 128)).to(tl.bfloat16)
            total_MN = add_product(total_MN, x_MK, w_KN)
        else:
            run = first_column * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_K * BLOCK_ROWS // 2)
            pairs = tl.load(of_block_B[:, None] + run[None, :], mask=is_block, other=0)
            halves = tl.join(pairs & 15, pairs >> 4)
            steps = tl.reshape(halves, (BLOCKS, BLOCK_K // 8, BLOCK_ROWS, 4, 2))
            codes_KN = tl.reshape(tl.permute(steps, (1, 4, 3, 0, 2)), (BLOCK_K, BLOCK_N))
            of_block_N = of_matrix_N + block_N * BLOCK_BYTES
            cell_N = first_column // BLOCK_K * BLOCK_ROWS + lane_N
            zero_N = tl.load(of_block_N + ZEROS_OFFSET + cell_N, mask=is_row_N, other=0)
            scales = (of_block_N + SCALES_OFFSET).to(tl.pointer_type(tl.bfloat16))
            scale_N = tl.load(scales + cell_N, mask=is_row_N, other=0.0).to(tl.float32)
            w_KN = centred(codes_KN, zero_N)
            sum_MN = add_product(tl.zeros_like(total_MN), x_MK, w_KN)
            total_MN += sum_MN * scale_N[None, :]
    return total_MN


@triton.jit
def scaled(
    total_MN,
    matrix,
    first_block,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    TURNS: tl.constexpr,
    TURN_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The finished sums of all columns."""
    if FORMAT == "int8":
        turn_N = tl.arange(0, BLOCK_N) // BLOCK_ROWS
        block_N = first_block + turn_N // TURNS
        lane_N = tl.arange(0, BLOCK_N) % BLOCK_ROWS
        of_block_N = matrix + turn_N % TURNS * TURN_BYTES + block_N * BLOCK_BYTES
        at_N = (of_block_N + SCALES_OFFSET).to(tl.pointer_type(tl.float32)) + lane_N
        is_row_N = block_N * BLOCK_ROWS + lane_N < ROWS
        total_MN = total_MN * tl.load(at_N, mask=is_row_N, other=0.0)[None, :]
    return total_MN
