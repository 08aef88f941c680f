"""Routing on a GPU: weights, expert numbers and a plan, without the host.

One launch for up to 16 tokens, two for more; the programs are in `programs/routing.py`. Triton is
imported when something is routed. Shape legend: T tokens, K experts per token, E experts, H hidden
size, P picks (T * K).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from moe_server.kernels.gpu.tiles import MAX_EXPERTS, PLACE_TILES_AT_ONCE, PLACE_WARPS, router_tile


@dataclass(frozen=True)
class DevicePlan:
    """Picks grouped by expert, on the device; `kernels.routing.RoutingPlan` is the host's.

    A pick's number is `token * K + choice`.
    """

    expert_ids: torch.Tensor
    """int64 (T, K): the experts of each token, in the router's order."""
    weights: torch.Tensor
    """float32 (T, K)."""
    order: torch.Tensor
    """int64 (P,): pick numbers by expert and, within one, by token."""
    offsets: torch.Tensor
    """int32 (E + 1,): the picks of expert e are order[offsets[e]:offsets[e + 1]]."""

    @cached_property
    def host_offsets(self) -> tuple[int, ...]:
        """`offsets` for the host, which has to know which experts to bring.

        **A layer's one host-device synchronisation**: reading it waits for all that the device was
        asked to do before.
        """
        return tuple(self.offsets.tolist())

    def experts(self) -> list[int]:
        """Experts with at least one pick, ascending."""
        return [e for e in range(len(self.host_offsets) - 1) if self.count_of(e)]

    def count_of(self, expert: int) -> int:
        """How many picks an expert has."""
        return self.host_offsets[expert + 1] - self.host_offsets[expert]

    def picks_of(self, expert: int) -> torch.Tensor:
        """int64: the numbers of an expert's picks, ascending."""
        return self.order[self.host_offsets[expert] : self.host_offsets[expert + 1]]

    def rows_of(self, expert: int) -> torch.Tensor:
        """int64: the tokens that go to one expert, ascending."""
        return self.picks_of(expert) // self.expert_ids.shape[1]


def route(x_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int) -> tuple[torch.Tensor, DevicePlan]:
    """Chooses each token's experts and groups the picks by expert.

    Logits are summed in float32 and rounded to bfloat16 before the softmax, as transformers does.
    Of experts with equal logits the lower number comes first. Transformers leaves such ties to
    `torch.topk`, which promises no order: on a CPU it was seen to prefer any of them.

    Args:
        x_TH: bfloat16 (T, H), T >= 1.
        gate_EH: bfloat16 (E, H). Beyond MAX_EXPERTS torch's operations serve, one after another.
        top_k: K <= E.

    Returns:
        The logits, bfloat16 (T, E), and the plan: weights sum to one, a token's largest comes
        first. A token with a NaN among its logits has NaN weights, and experts all the same.
    """
    # Triton takes a second to import, and is there on machines with a GPU only.
    from moe_server.kernels.gpu.programs import routing as programs  # noqa: PLC0415

    (num_tokens, hidden_size), num_experts = x_TH.shape, gate_EH.shape[0]
    assert x_TH.dtype is gate_EH.dtype is torch.bfloat16
    assert x_TH.is_contiguous()
    assert gate_EH.is_contiguous()
    assert gate_EH.shape[1] == hidden_size
    assert 1 <= top_k <= num_experts
    if num_experts > MAX_EXPERTS:
        logits_TE = F.linear(x_TH, gate_EH)
        chosen = logits_TE.float().softmax(dim=-1).topk(top_k, dim=-1)
        weights_TK = chosen.values / chosen.values.sum(dim=-1, keepdim=True)
        return logits_TE, plan_chosen(chosen.indices, weights_TK, num_experts)
    tile = router_tile(num_experts)
    logits_TE = x_TH.new_empty(num_tokens, num_experts)
    weights_TK = x_TH.new_empty(num_tokens, top_k, dtype=torch.float32)
    ids_TK = x_TH.new_empty(num_tokens, top_k, dtype=torch.int64)
    order_P = x_TH.new_empty(num_tokens * top_k, dtype=torch.int64)
    offsets = x_TH.new_empty(num_experts + 1, dtype=torch.int32)
    plan = DevicePlan(ids_TK, weights_TK, order_P, offsets)
    sizes = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "BLOCK_T": tile.tokens}
    router = {"HIDDEN": hidden_size, "BLOCK_H": tile.columns, "PARTS": tile.parts}
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if num_tokens <= tile.tokens:
        programs.route_one_tile[(1,)](
            x_TH, gate_EH, logits_TE, weights_TK, ids_TK, order_P, offsets, num_tokens,
            **sizes, **router, **launch,
        )  # fmt: skip
        return logits_TE, plan
    num_tiles = -(-num_tokens // tile.tokens)
    tile_counts = x_TH.new_empty(num_tiles, num_experts, dtype=torch.int32)
    programs.choose_and_count[(num_tiles,)](
        x_TH, gate_EH, logits_TE, weights_TK, ids_TK, tile_counts, num_tokens,
        **sizes, **router, **launch,
    )  # fmt: skip
    programs.place_tiles[(num_tiles,)](
        ids_TK, tile_counts, order_P, offsets, num_tokens, num_tiles,
        **sizes, BLOCK_TILES=PLACE_TILES_AT_ONCE, num_warps=PLACE_WARPS, num_stages=1,
    )  # fmt: skip
    return logits_TE, plan


def plan_chosen(
    expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int
) -> DevicePlan:
    """The plan of another router's choice, by torch's operations.

    Args:
        expert_ids_TK: int64, distinct in a token, each in [0, num_experts).
        weights_TK: As the router gave them.
        num_experts: E.
    """
    picks = expert_ids_TK.flatten()
    # Not `bincount`: on a GPU it synchronises, to learn the largest number.
    counts = (picks == torch.arange(num_experts, device=picks.device)[:, None]).sum(dim=1)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    order = torch.argsort(picks, stable=True)
    return DevicePlan(expert_ids_TK.contiguous(), weights_TK.float().contiguous(), order, offsets)
