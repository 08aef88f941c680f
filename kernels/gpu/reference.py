"""What the GPU's programs should compute, in float64 and one step after another.

Torch only. Called by tests, and by whoever checks a GPU. Shape legend: T tokens, K experts per
token, E experts, H hidden size, I intermediate size, P picks (T * K).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from moe_server.kernels.gpu.routing import DevicePlan

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""float64 w1 (I, H), w3 (I, H), w2 (H, I)."""


def route_reference(
    x_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, DevicePlan]:
    """As `routing.route`, but for the dtype of logits and weights: float64."""
    logits_TE = F.linear(x_TH.double(), gate_EH.double()).to(x_TH.dtype).double()
    by_logit_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices
    ids_TK = by_logit_TE[:, :top_k]
    weights_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return logits_TE, plan_reference(ids_TK, gate_EH.shape[0], weights_TK)


def plan_reference(
    ids_TK: torch.Tensor, num_experts: int, weights_TK: torch.Tensor | None = None
) -> DevicePlan:
    """The plan of a choice; weights are ones where they do not matter."""
    picks = ids_TK.flatten()
    counts = torch.bincount(picks, minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    weights = torch.ones_like(ids_TK, dtype=torch.float64) if weights_TK is None else weights_TK
    return DevicePlan(ids_TK, weights, torch.argsort(picks, stable=True), offsets.int())


def swiglu_reference(
    x_TH: torch.Tensor, ids_TK: torch.Tensor, experts: Mapping[int, Expert]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of every pick whose expert is given, and how far rounding may take it from there.

    Args:
        x_TH: (T, H).
        ids_TK: int64 (T, K).
        experts: By number.

    Returns:
        float64 (P, H), zero where the expert is not given; a bound of the error that comes of
        rounding gate times up, and the output, to bfloat16: float64 (P, H).
    """
    num_choices, hidden_size = ids_TK.shape[1], x_TH.shape[1]
    outputs_PH = x_TH.new_zeros(ids_TK.numel(), hidden_size, dtype=torch.float64)
    bound_PH = torch.zeros_like(outputs_PH)
    # Half a unit in the last place, and a little for an exponential that is approximate.
    rounding = torch.finfo(torch.bfloat16).eps / 2 * 1.01
    for expert, (w1, w3, w2) in experts.items():
        picks = (ids_TK.flatten() == expert).nonzero()[:, 0]
        x = x_TH[picks // num_choices].double()
        hidden = F.silu(x @ w1.T) * (x @ w3.T)
        outputs_PH[picks] = hidden @ w2.T
        # What float32 sums lose of gate and up is relative to all that was added.
        lost = 2.0**-20 * ((x.abs() @ w1.abs().T) + 1) * ((x.abs() @ w3.abs().T) + 1)
        bound = (rounding * hidden.abs() + lost) @ w2.abs().T
        bound_PH[picks] = bound + rounding * (outputs_PH[picks].abs() + bound)
    return outputs_PH, bound_PH
