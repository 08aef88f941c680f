"""From the router's choice to a plan: which rows of the batch go to which expert.

Torch only, imports nothing of ours. Shape legend: T tokens, K experts per token, E experts,
H hidden size.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Rows of a batch grouped by expert.

    A *pick* is one (token, choice) pair; there are T * K of them. `order` sorts them by expert and,
    within an expert, by token: a stable order, so that equal inputs give equal sums.
    """

    order: torch.Tensor
    """int64 (T * K,): pick numbers, `token * K + choice`, grouped by expert."""
    experts: tuple[int, ...]
    """Experts with at least one pick, ascending."""
    offsets: tuple[int, ...]
    """len(experts) + 1 bounds: the picks of experts[i] are order[offsets[i]:offsets[i + 1]]."""


def plan_routing(expert_ids_TK: torch.Tensor, num_experts: int) -> RoutingPlan:
    """Groups the picks of a batch by expert.

    Args:
        expert_ids_TK: int64 (T, K), each in [0, num_experts).
        num_experts: E.
    """
    picks = expert_ids_TK.flatten()
    order = torch.argsort(picks, stable=True)
    # On a GPU this is the layer's one host-device synchronisation: the cache has to know which
    # experts to bring.
    counts = torch.bincount(picks, minlength=num_experts).tolist()
    experts = tuple(expert for expert, count in enumerate(counts) if count)
    offsets = [0]
    for expert in experts:
        offsets.append(offsets[-1] + counts[expert])
    return RoutingPlan(order, experts, tuple(offsets))


def combine(
    outputs_PH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Weights the experts' outputs and sums them per token, in ascending order of expert.

    That order is fixed whatever order experts were computed in, so the sum does not depend on where
    their weights were. Each product is rounded to the activations' dtype before it is added, as the
    Hugging Face model does: results are equal to it bit for bit.

    Args:
        outputs_PH: (T * K, H), row `token * K + choice`.
        expert_ids_TK: int64 (T, K).
        weights_TK: float32 (T, K).

    Returns:
        (T, H) in the dtype of `outputs_PH`.
    """
    num_tokens, num_choices = expert_ids_TK.shape
    by_expert_TK = expert_ids_TK.argsort(dim=-1)
    first_pick_T = torch.arange(num_tokens, device=expert_ids_TK.device) * num_choices
    total_TH = outputs_PH.new_zeros(num_tokens, outputs_PH.shape[1])
    for choices_T in by_expert_TK.unbind(dim=1):
        weights_T1 = weights_TK.gather(1, choices_T[:, None])
        total_TH += (outputs_PH[first_pick_T + choices_T] * weights_T1).to(outputs_PH.dtype)
    return total_TH
