"""The dense layers of the module on our kernels.

oneDNN's bfloat16 products round by the number of rows on machines that have bfloat16 instructions:
a request's tokens would depend on its neighbours. Ours do not, and read weights twice as fast at
one row. Quantised matrices have no other way at all. Replaces modules of a model before its weights
are loaded; parameter names stay. Shape legend: T tokens, H hidden size, E
experts, M rows, K columns, N rows of a matrix.
"""

from typing import Any

import torch
from torch import nn

from moe_server.checkpoint import EMBEDDING, OUTPUT, Checkpoint
from moe_server.kernels.dense import int8_embedding, int8_linear
from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.kernels.gpu.routing import DevicePlan
from moe_server.kernels.gpu.routing import route as route_on_gpu
from moe_server.kernels.products import are_compiled, linear, prepare
from moe_server.kernels.routing import route
from moe_server.mixtral import Router


def use_kernels(
    module: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    routes_on_gpu: bool = False,
) -> None:
    """Replaces linear layers, routers and the embedding where they are ours to compute.

    Args:
        module: The model, before its weights are loaded.
        checkpoint: How they are stored.
        device: Where they will be.
        routes_on_gpu: The experts take the plans of the GPU's routing.
    """
    dtype: torch.dtype = getattr(torch, checkpoint.dtype)
    has_kernels = (
        device.type == "cpu" and dtype == torch.bfloat16 and are_compiled(WeightFormat.BFLOAT16)
    )
    for name, child in list(module.named_modules()):
        layout = _layout(checkpoint, name)
        ours: nn.Module | None = None
        if isinstance(child, nn.Embedding) and layout is not None:
            ours = Int8Embedding(layout, dtype)
        elif isinstance(child, nn.Linear) and layout is not None:
            ours = Int8Linear(layout, child)
        elif isinstance(child, nn.Linear) and has_kernels:
            ours = KernelLinear(child)
        elif isinstance(child, Router) and routes_on_gpu:
            ours = GpuRouter(child)
        elif name.endswith(".gate") and has_kernels and not isinstance(child, Router):
            ours = KernelRouter(child)
        if ours is not None:
            module.set_submodule(name, ours)


def _layout(checkpoint: Checkpoint, name: str) -> MatrixLayout | None:
    """How a module's weights are quantised; None: they are not."""
    tensor = checkpoint.dense.get(f"{name}.weight")
    if tensor is None and name == OUTPUT:  # it is tied to the embedding
        tensor = checkpoint.dense.get(f"{EMBEDDING}.weight")
    return None if tensor is None else tensor.layout


class KernelLinear(nn.Module):
    """A linear layer in bfloat16."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        self.weight = replaced.weight
        self.bias = replaced.bias
        self._out_features = replaced.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N)."""
        product_MN = _product(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return product_MN.view(*x.shape[:-1], self._out_features)


class GpuRouter(nn.Module):
    """A router whose plan the host has not seen."""

    def __init__(self, replaced: Router) -> None:
        super().__init__()
        self.weight = replaced.weight
        self._top_k = replaced.top_k

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, DevicePlan]:
        """Router logits (T, E), and the plan."""
        return route_on_gpu(x_TH.contiguous(), self.weight, self._top_k)


class KernelRouter(nn.Module):
    """A router with the interface of transformers' own."""

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.weight: torch.Tensor = replaced.weight
        self._top_k: int = replaced.top_k
        # Mixtral's always normalises, and leaves weights in float32.
        self._is_mixtral_s = not hasattr(replaced, "norm_topk_prob")
        self._normalises: bool = self._is_mixtral_s or replaced.norm_topk_prob

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits (T, E), weights and experts int64 (T, top_k), by expert."""
        logits_TE, plan = route(x.reshape(-1, x.shape[-1]), self.weight, self._top_k)
        weights_TK = plan.weights
        if not self._normalises:
            weights_TK = logits_TE.float().softmax(dim=-1).gather(1, plan.expert_ids)
        if not self._is_mixtral_s:
            weights_TK = weights_TK.to(logits_TE.dtype)
        return logits_TE, weights_TK, plan.expert_ids


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8."""

    def __init__(self, layout: MatrixLayout, replaced: nn.Linear) -> None:
        super().__init__()
        self._layout = layout
        self.weight = _quantised_parameter(layout)
        self.bias = replaced.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N)."""
        return int8_linear(x, self.weight, self._layout, self.bias)


class Int8Embedding(nn.Module):
    """An embedding whose rows are int8."""

    def __init__(self, layout: MatrixLayout, dtype: torch.dtype) -> None:
        super().__init__()
        self._layout, self._dtype = layout, dtype
        self.weight = _quantised_parameter(layout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., K)."""
        return int8_embedding(ids, self.weight, self._layout, self._dtype)


def _quantised_parameter(layout: MatrixLayout) -> nn.Parameter:
    storage = torch.empty(layout.nbytes, dtype=torch.uint8, device="meta")
    return nn.Parameter(storage, requires_grad=False)


def _product(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    rows, columns = weight_NK.shape
    layout = MatrixLayout(rows, columns, WeightFormat.BFLOAT16)
    # A bias is added before the sums are rounded, as torch does.
    dtype = torch.bfloat16 if bias_N is None else torch.float32
    out_MN = torch.empty(x_MK.shape[0], rows, dtype=dtype)
    weights = weight_NK.detach().contiguous().view(-1).view(torch.uint8)
    linear(prepare(x_MK, layout), weights, layout, out_MN)
    return out_MN if bias_N is None else (out_MN + bias_N.float()).to(torch.bfloat16)
