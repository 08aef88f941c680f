"""The programs of routing; `kernels/gpu/routing.py` launches them.

A program has a tile of tokens: it computes their logits, chooses their experts and counts. Where
one tile holds the batch it also puts the picks in order; else a second launch does, which sums the
counts of the tiles before. Nothing depends on which program runs first: there are no atomics.
Numbers of tokens are not specialised: a new one must not compile anything.
Shape legend: T tokens of a tile, E experts (padded to a power of two), H columns of a step, S the
parts in which a step's columns are summed side by side.
"""

import triton
import triton.language as tl

from moe_server.kernels.gpu.programs.arithmetic import add_product, to_bfloat16


@triton.jit
def choose(
    x,
    gate,
    logits,
    weights,
    ids,
    num_tokens,
    first_token,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes the logits of a tile's tokens, and the weights and numbers of their experts.

    Returns:
        int32 (T, E): the choice that an expert is of a token, 0 the best, -1 none.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    STEP: tl.constexpr = PARTS * BLOCK_H
    token = first_token + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    expert = tl.arange(0, PADDED)
    part = tl.arange(0, PARTS)[:, None, None] * BLOCK_H
    x_row = x + token.to(tl.int64)[None, :, None] * HIDDEN
    gate_row = gate + expert[None, None, :] * HIDDEN
    sums_STE = tl.zeros((PARTS, BLOCK_T, PADDED), tl.float32)
    for first in range(0, HIDDEN, STEP):
        of_x = first + part + tl.arange(0, BLOCK_H)[None, None, :]
        of_gate = first + part + tl.arange(0, BLOCK_H)[None, :, None]
        is_x = is_token[None, :, None]
        is_gate = expert[None, None, :] < NUM_EXPERTS
        if HIDDEN % STEP:
            is_x = is_x & (of_x < HIDDEN)
            is_gate = is_gate & (of_gate < HIDDEN)
        x_STH = tl.load(x_row + of_x, mask=is_x, other=0.0)
        gate_SHE = tl.load(gate_row + of_gate, mask=is_gate, other=0.0)
        sums_STE = add_product(sums_STE, x_STH, gate_SHE)
    # As transformers rounds them: experts that differ by less are equal.
    rounded_TE = to_bfloat16(tl.sum(sums_STE, 0))
    is_logit_TE = is_token[:, None] & (expert[None, :] < NUM_EXPERTS)
    of_token_T = logits + token.to(tl.int64) * NUM_EXPERTS
    tl.store(of_token_T[:, None] + expert[None, :], rounded_TE, mask=is_logit_TE)
    logits_TE = rounded_TE.to(tl.float32)
    logits_TE = tl.where(expert[None, :] < NUM_EXPERTS, logits_TE, -float("inf"))
    largest_T = tl.max(logits_TE, 1)
    powers_TE = tl.exp(logits_TE - largest_T[:, None])
    probabilities_TE = powers_TE / tl.sum(powers_TE, 1)[:, None]
    # NaN comes first, as in torch.topk; a choice is a real expert whatever the logits are.
    rank_TE = tl.where(logits_TE == logits_TE, logits_TE, float("inf"))
    is_free_TE = (expert[None, :] < NUM_EXPERTS) & is_token[:, None]
    choice_TE = tl.full((BLOCK_T, PADDED), -1, tl.int32)
    for choice in tl.static_range(TOP_K):
        best_T = tl.max(tl.where(is_free_TE, rank_TE, -float("inf")), 1)
        is_best_TE = is_free_TE & (rank_TE == best_T[:, None])
        id_T = tl.min(tl.where(is_best_TE, expert[None, :], PADDED), 1)
        is_chosen_TE = expert[None, :] == id_T[:, None]
        choice_TE = tl.where(is_chosen_TE, choice, choice_TE)
        is_free_TE = is_free_TE & (expert[None, :] != id_T[:, None])
    chosen_TE = tl.where(choice_TE >= 0, probabilities_TE, 0.0)
    weights_TE = chosen_TE / tl.sum(chosen_TE, 1)[:, None]
    at_TE = token[:, None] * TOP_K + choice_TE
    tl.store(weights + at_TE, weights_TE, mask=choice_TE >= 0)
    ids_TE = tl.zeros_like(choice_TE) + expert[None, :]
    tl.store(ids + at_TE, ids_TE.to(tl.int64), mask=choice_TE >= 0)
    return choice_TE


@triton.jit
def place(order, choice_TE, begin_E, first_token, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """Puts a tile's picks in order, those of expert e from place begin_E[e] on."""
    token = first_token + tl.arange(0, BLOCK_T)
    is_chosen_TE = choice_TE >= 0
    count_TE = is_chosen_TE.to(tl.int32)
    rank_TE = tl.cumsum(count_TE, 0) - count_TE
    pick_TE = token[:, None] * TOP_K + choice_TE
    tl.store(order + begin_E[None, :] + rank_TE, pick_TE.to(tl.int64), mask=is_chosen_TE)


@triton.jit
def store_offsets(offsets, count_E, end_E, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr):
    """offsets[e] = first place of expert e, offsets[NUM_EXPERTS] = picks."""
    expert = tl.arange(0, PADDED)
    tl.store(offsets + expert, end_E - count_E, mask=expert < NUM_EXPERTS)
    tl.store(offsets + expert + 1, end_E, mask=expert == NUM_EXPERTS - 1)


@triton.jit(do_not_specialize=["num_tokens"])
def route_one_tile(
    x,
    gate,
    logits,
    weights,
    ids,
    order,
    offsets,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """All of routing for at most BLOCK_T tokens, in one program.

    Args:
        x: bfloat16 (num_tokens, HIDDEN).
        gate: bfloat16 (NUM_EXPERTS, HIDDEN).
        logits: bfloat16 (num_tokens, NUM_EXPERTS).
        weights: float32 (num_tokens, TOP_K).
        ids: int64 (num_tokens, TOP_K).
        order: int64 (num_tokens * TOP_K,).
        offsets: int32 (NUM_EXPERTS + 1,).
        num_tokens: T.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    choice_TE = choose(
        x, gate, logits, weights, ids, num_tokens, 0,
        NUM_EXPERTS, TOP_K, HIDDEN, BLOCK_T, BLOCK_H, PARTS,
    )  # fmt: skip
    count_E = tl.sum((choice_TE >= 0).to(tl.int32), 0)
    end_E = tl.cumsum(count_E, 0)
    store_offsets(offsets, count_E, end_E, NUM_EXPERTS, PADDED)
    place(order, choice_TE, end_E - count_E, 0, TOP_K, BLOCK_T)


@triton.jit(do_not_specialize=["num_tokens"])
def choose_and_count(
    x,
    gate,
    logits,
    weights,
    ids,
    tile_counts,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Weights and numbers of the experts, and each tile's counts: int32 (tiles, NUM_EXPERTS)."""
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    tile = tl.program_id(0)
    choice_TE = choose(
        x, gate, logits, weights, ids, num_tokens, tile * BLOCK_T,
        NUM_EXPERTS, TOP_K, HIDDEN, BLOCK_T, BLOCK_H, PARTS,
    )  # fmt: skip
    expert = tl.arange(0, PADDED)
    count_E = tl.sum((choice_TE >= 0).to(tl.int32), 0)
    tl.store(tile_counts + tile * NUM_EXPERTS + expert, count_E, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def place_tiles(
    ids,
    tile_counts,
    order,
    offsets,
    num_tokens,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The order and the offsets, from what `choose_and_count` has written."""
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    tile = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    count_E = tl.zeros((PADDED,), tl.int32)
    before_E = tl.zeros((PADDED,), tl.int32)
    for first in range(0, num_tiles, BLOCK_TILES):
        other = first + tl.arange(0, BLOCK_TILES)[:, None]
        is_there = (other < num_tiles) & (expert[None, :] < NUM_EXPERTS)
        at = tile_counts + other * NUM_EXPERTS + expert[None, :]
        counts = tl.load(at, mask=is_there, other=0)
        count_E += tl.sum(counts, 0)
        before_E += tl.sum(tl.where(other < tile, counts, 0), 0)
    end_E = tl.cumsum(count_E, 0)
    if tile == 0:
        store_offsets(offsets, count_E, end_E, NUM_EXPERTS, PADDED)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    choice_TE = tl.full((BLOCK_T, PADDED), -1, tl.int32)
    for choice in tl.static_range(TOP_K):
        id_T = tl.load(ids + token * TOP_K + choice, mask=token < num_tokens, other=PADDED)
        choice_TE = tl.where(expert[None, :] == id_T.to(tl.int32)[:, None], choice, choice_TE)
    place(order, choice_TE, end_E - count_E + before_E, tile * BLOCK_T, TOP_K, BLOCK_T)
