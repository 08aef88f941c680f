"""Attention of a ragged batch over paged keys and values.

Registered with transformers as an attention function: the stock model calls it with all new tokens
of a step in one row, and it attends each request to its own pages. Requests never meet in one
product, so a request's result does not depend on its neighbours.

Shape legend: T new tokens of the step, N those of one request, G query heads per key/value head,
C tokens of context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moe_server.budget import QUERY_TILE_TOKENS
from moe_server.kv_cache import PagedKv

ATTENTION_NAME = "moe_server_paged"


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """One request's part of a step."""

    start: int
    """Its first row among the step's new tokens."""
    num_new: int
    num_context: int
    """Its tokens once the new ones are stored: the last new one attends to all of them."""
    num_prompt: int
    """Those of its prompt."""
    block_table: torch.Tensor
    """int64 (blocks,)."""


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """What attention has to know about a step."""

    spans: Sequence[RequestSpan]
    kv: PagedKv
    kv_positions: torch.Tensor
    """int64 (T,): where each new token's keys and values are stored."""


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    ragged_batch: RaggedBatch,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Stores the new keys and values, then attends every request to its own.

    Args:
        module: The attention module; `layer_idx` names the layer.
        query: (1, heads, T, head_dim), rotated.
        key: (1, kv_heads, T, head_dim), rotated.
        value: As `key`.
        attention_mask: None; which tokens see which follows from the spans.
        scaling: Factor of the scores.
        ragged_batch: The step.
        sliding_window: Tokens a query sees back, itself included; None: all.

    Returns:
        (1, T, heads, head_dim), and None for the attention weights.
    """
    assert attention_mask is None
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv = ragged_batch.kv
    kv.write(layer, ragged_batch.kv_positions, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = torch.empty_like(query[0].transpose(0, 1))
    for span in ragged_batch.spans:
        keys, values = kv.gather(layer, span.block_table, span.num_context)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        first_new = span.num_context - span.num_new
        # Tiles begin at fixed positions of the request, not of the step: how a position is rounded
        # does not depend on the chunk it came in. A generated token is a tile of its own, also when
        # it is computed again after a preemption, together with others.
        tile = first_new
        while tile < span.num_context:
            next_tile = (tile // QUERY_TILE_TOKENS + 1) * QUERY_TILE_TOKENS
            next_tile = min(next_tile, max(tile + 1, span.num_prompt), span.num_context)
            rows = slice(span.start + tile - first_new, span.start + next_tile - first_new)
            output[rows] = _attend(query[:, :, rows], keys, values, tile, scaling, sliding_window)
            tile = next_tile
    return output[None], None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_position: int,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of N consecutive queries of one request.

    Args:
        query: (1, heads, N, head_dim); the first is at `first_position` of the request.
        keys: (1, kv_heads, C, head_dim), from the request's position 0 on.
        values: As `keys`.
        first_position: Position of the first query.
        scaling: Factor of the scores.
        sliding_window: Tokens a query sees back, itself included; None: all.

    Returns:
        (N, heads, head_dim).
    """
    _, num_heads, num_new, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    begin = 0 if sliding_window is None else max(0, first_position - sliding_window + 1)
    end = first_position + num_new
    keys, values = keys[:, :, begin:end], values[:, :, begin:end]
    mask = None
    if num_new > 1:
        query_positions = torch.arange(first_position, end, device=query.device)[:, None]
        key_positions = torch.arange(begin, end, device=query.device)[None, :]
        mask = key_positions <= query_positions
        if sliding_window is not None:
            mask &= key_positions > query_positions - sliding_window
        mask = mask.repeat(num_heads // num_kv_heads, 1)
    # The query heads that share a key/value head are rows of one product: keys are read once.
    packed = query.reshape(1, num_kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return attended.reshape(num_heads, num_new, head_dim).transpose(0, 1)
