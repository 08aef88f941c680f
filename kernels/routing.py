"""From a layer's input to a plan: which expert computes which rows of the batch, and the way back.

`route` asks the router and plans in one call where the compiled kernels serve, by torch elsewhere;
`plan_routing` takes the choice of another router; `combine` sums what the experts gave. Imports
nothing of ours outside kernels. Shape legend: T tokens, K experts per token, E experts, H hidden
size, P = T * K.

**Near-ties.** As in the Hugging Face model, logits are rounded to the activations' dtype, and
experts are compared by their float32 probabilities. Of experts that are exactly equal, the Hugging
Face model takes those that `torch.topk` happens to leave in front: on a CPU what libstdc++'s
std::nth_element makes of them (std::partial_sort from 64 experts per choice on), neither the first
nor the last. The compiled kernels run the same algorithm on such tokens, so the choice is the same
(but where logits differ by less than the last bit of a probability, and exponentials are rounded).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from moe_server.kernels import native


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Rows of a batch grouped by expert.

    A *pick* is a token and one of its experts; there are P of them. Picks are ordered by expert
    and, within an expert, by token: equal inputs give equal sums.
    """

    expert_ids: torch.Tensor
    """int64 (T, K): the experts of each token, ascending."""
    weights: torch.Tensor
    """float32 (T, K): their weights, in the same order."""
    rows: torch.Tensor
    """int64 (P,): the token of each pick, in the order of picks."""
    places: torch.Tensor
    """int64 (T, K): where each token's picks are in `rows`, in the order of `expert_ids`."""
    offsets: tuple[int, ...]
    """E + 1 bounds: the picks of expert e are rows[offsets[e]:offsets[e + 1]]."""

    def experts(self) -> list[int]:
        """Experts with at least one pick, ascending."""
        return [e for e in range(len(self.offsets) - 1) if self.count_of(e)]

    def count_of(self, expert: int) -> int:
        """How many picks an expert has."""
        return self.offsets[expert + 1] - self.offsets[expert]

    def picks_of(self, expert: int) -> slice:
        """The picks of one expert."""
        return slice(self.offsets[expert], self.offsets[expert + 1])

    def rows_of(self, expert: int) -> torch.Tensor:
        """int64: the tokens that go to one expert, ascending."""
        return self.rows[self.offsets[expert] : self.offsets[expert + 1]]


def route(
    x_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, RoutingPlan]:
    """The router: logits, softmax, the `top_k` best, weights that sum up to 1, and the plan.

    A token's results do not depend on the tokens beside it where the compiled kernels serve.

    Args:
        x_TH: The layer's input.
        gate_EH: The router's weights, contiguous, in the dtype of `x_TH`.
        top_k: K.

    Returns:
        The logits (T, E), rounded to the dtype of `x_TH`, and the plan.
    """
    num_experts = gate_EH.shape[0]
    if x_TH.dtype is gate_EH.dtype is torch.bfloat16 and _is_compiled(x_TH, num_experts):
        routed = native.route(x_TH.contiguous(), gate_EH, top_k)
        logits_TE, expert_ids_TK, weights_TK, rows, places_TK, offsets = routed
        return logits_TE, RoutingPlan(expert_ids_TK, weights_TK, rows, places_TK, offsets)
    logits_TE = F.linear(x_TH, gate_EH)
    weights_TK, expert_ids_TK = F.softmax(logits_TE.float(), dim=-1).topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return logits_TE, plan_routing(expert_ids_TK, weights_TK, num_experts)


def plan_routing(
    expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int
) -> RoutingPlan:
    """Groups the picks of a batch by expert.

    Args:
        expert_ids_TK: int64, distinct in a token, each in [0, num_experts).
        weights_TK: In any float dtype; the plan's are float32.
        num_experts: E.
    """
    expert_ids_TK, by_expert_TK = expert_ids_TK.sort(dim=-1)
    weights_TK = weights_TK.float().gather(1, by_expert_TK)
    if _is_compiled(expert_ids_TK, num_experts):
        rows, places_TK, offsets = native.plan(expert_ids_TK.contiguous(), num_experts)
        return RoutingPlan(expert_ids_TK, weights_TK, rows, places_TK, offsets)
    picks = expert_ids_TK.flatten()
    order = torch.argsort(picks, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    # On a GPU this is the layer's one host-device synchronisation: the cache has to know which
    # experts to bring.
    counts = torch.bincount(picks, minlength=num_experts).tolist()
    rows = order // expert_ids_TK.shape[1]
    places_TK = places.view(expert_ids_TK.shape)
    offsets = tuple(accumulate(counts, initial=0))
    return RoutingPlan(expert_ids_TK, weights_TK, rows, places_TK, offsets)


def combine(outputs_PH: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Weights the experts' outputs and sums them per token, in ascending order of expert.

    That order is fixed whatever order experts were computed in, so the sum does not depend on where
    their weights were. Each product is rounded to the activations' dtype before it is added, as the
    Hugging Face model does: results are equal to it bit for bit.

    Args:
        outputs_PH: One row for each pick, in the plan's order.
        plan: The plan.

    Returns:
        (T, H) in the dtype of `outputs_PH`.
    """
    dtype = outputs_PH.dtype
    if dtype is torch.bfloat16 and outputs_PH.is_cpu and native.is_available():
        return native.combine(outputs_PH, plan.places, plan.weights)
    total_TH = outputs_PH.new_zeros(len(plan.places), outputs_PH.shape[1])
    for places_T, weights_T in zip(
        plan.places.unbind(dim=1), plan.weights.unbind(dim=1), strict=True
    ):
        total_TH += (outputs_PH[places_T] * weights_T[:, None]).to(dtype)
    return total_TH


def _is_compiled(x: torch.Tensor, num_experts: int) -> bool:
    return x.is_cpu and num_experts <= native.MOST_EXPERTS and native.is_available()
