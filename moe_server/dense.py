"""The dense layers of the module on our kernels, where the library's would depend on the batch.

oneDNN's bfloat16 products round by the number of rows on machines that have bfloat16 instructions:
a request's tokens would depend on its neighbours. Ours do not, and read weights twice as fast at
one row. Replaces modules of a transformers model before its weights are loaded; parameter names
stay.
Shape legend: T tokens, H hidden size, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.products import are_compiled, linear, prepare


def use_kernels(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces linear layers and routers, where kernels serve the dtype on the device."""
    is_served = device.type == "cpu" and dtype == torch.bfloat16
    if not (is_served and are_compiled(WeightFormat.BFLOAT16)):
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and len(list(child.parameters())) == 1:
                parent.register_module(name, KernelLinear(child))
            elif name == "gate" and hasattr(child, "top_k"):
                parent.register_module(name, KernelRouter(child))


class KernelLinear(nn.Module):
    """A linear layer without bias in bfloat16."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        self.weight = replaced.weight
        self.in_features, self.out_features = replaced.in_features, replaced.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N)."""
        return _product(x.reshape(-1, x.shape[-1]), self.weight).view(
            *x.shape[:-1], self.out_features
        )


class KernelRouter(nn.Module):
    """A router as transformers' own, but for the product."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.weight: torch.Tensor = replaced.weight  # type: ignore[assignment]
        self.top_k: int = replaced.top_k  # type: ignore[assignment]

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits (T, E), weights float32 and experts int64 (T, top_k)."""
        logits_TE = _product(x_TH.reshape(-1, x_TH.shape[-1]), self.weight)
        # Rounded to the activations' dtype before the softmax: near-ties break as transformers'.
        weights_TK, experts_TK = F.softmax(logits_TE.float(), dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), experts_TK


def _product(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    rows, columns = weight_NK.shape
    layout = MatrixLayout(rows, columns, WeightFormat.BFLOAT16)
    out_MN = torch.empty(x_MK.shape[0], layout.rows, dtype=torch.bfloat16)
    weights = weight_NK.detach().contiguous().view(-1).view(torch.uint8)
    linear(prepare(x_MK, layout), weights, layout, out_MN)
    return out_MN
