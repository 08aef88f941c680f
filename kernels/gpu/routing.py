"""Routing on a GPU: weights, expert numbers and a plan, without the host.

One launch for up to 16 tokens, two for more; the programs are in `programs/routing.py`. Triton is
imported when something is routed. Shape legend: T tokens, K experts per token, E experts, H hidden
size, P picks (T * K).
"""

from dataclasses import dataclass

import torch

from moe_server.kernels.gpu.tiles import PLACE_TILES_AT_ONCE, PLACE_WARPS, router_tile
from moe_server.kernels.routing import RoutingPlan


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A `RoutingPlan` that the host has not seen."""

    order: torch.Tensor
    """int64 (P,): pick numbers, `token * K + choice`, by expert and, within one, by token."""
    offsets: torch.Tensor
    """int32 (E + 1,): the picks of expert e are order[offsets[e]:offsets[e + 1]]."""

    def on_host(self, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> RoutingPlan:
        """What the expert cache has to know: a layer's one host-device synchronisation.

        Args:
            expert_ids_TK: As `route` gave them.
            weights_TK: As `route` gave them.
        """
        expert_ids, by_expert = expert_ids_TK.sort(dim=-1)
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(self.order), device=self.order.device)
        return RoutingPlan(
            expert_ids,
            weights_TK.gather(1, by_expert),
            self.order // expert_ids_TK.shape[1],
            places.view(expert_ids_TK.shape).gather(1, by_expert),
            tuple(self.offsets.tolist()),
        )


def route(
    x_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, DevicePlan]:
    """Chooses each token's experts and groups the picks by expert.

    Logits are summed in float32 and rounded to bfloat16 before the softmax, as transformers does.
    Of experts with equal logits the lower number comes first. Transformers leaves such ties to
    `torch.topk`, which promises no order: on a CPU it was seen to prefer any of them.

    Args:
        x_TH: bfloat16 (T, H), T >= 1.
        gate_EH: bfloat16 (E, H), E <= MAX_EXPERTS.
        top_k: K <= E.

    Returns:
        Weights, float32 (T, K), that sum to one, the largest first; expert numbers, int64 (T, K);
        the plan. A token with a NaN among its logits has NaN weights, and experts all the same.
    """
    # Triton takes a second to import, and is there on machines with a GPU only.
    from moe_server.kernels.gpu.programs import routing as programs  # noqa: PLC0415

    (num_tokens, hidden_size), num_experts = x_TH.shape, gate_EH.shape[0]
    assert x_TH.dtype is gate_EH.dtype is torch.bfloat16
    assert x_TH.is_contiguous()
    assert gate_EH.is_contiguous()
    assert gate_EH.shape[1] == hidden_size
    assert 1 <= top_k <= num_experts
    tile = router_tile(num_experts)
    weights_TK = x_TH.new_empty(num_tokens, top_k, dtype=torch.float32)
    ids_TK = x_TH.new_empty(num_tokens, top_k, dtype=torch.int64)
    order_P = x_TH.new_empty(num_tokens * top_k, dtype=torch.int64)
    offsets = x_TH.new_empty(num_experts + 1, dtype=torch.int32)
    sizes = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "BLOCK_T": tile.tokens}
    router = {"HIDDEN": hidden_size, "BLOCK_H": tile.columns, "PARTS": tile.parts}
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if num_tokens <= tile.tokens:
        programs.route_one_tile[(1,)](
            x_TH, gate_EH, weights_TK, ids_TK, order_P, offsets, num_tokens,
            **sizes, **router, **launch,
        )  # fmt: skip
        return weights_TK, ids_TK, DevicePlan(order_P, offsets)
    num_tiles = -(-num_tokens // tile.tokens)
    tile_counts = x_TH.new_empty(num_tiles, num_experts, dtype=torch.int32)
    programs.choose_and_count[(num_tiles,)](
        x_TH, gate_EH, weights_TK, ids_TK, tile_counts, num_tokens, **sizes, **router, **launch
    )
    programs.place_tiles[(num_tiles,)](
        ids_TK, tile_counts, order_P, offsets, num_tokens, num_tiles,
        **sizes, BLOCK_TILES=PLACE_TILES_AT_ONCE, num_warps=PLACE_WARPS, num_stages=1,
    )  # fmt: skip
    return weights_TK, ids_TK, DevicePlan(order_P, offsets)
