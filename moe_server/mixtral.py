"""The Mixtral architecture in its plain form, without transformers.

Importing transformers' own takes 3 s and 100 MB on a small machine and its layers cost more Python
than this; both count where a server starts cold or decodes one token at a time. Operation for
operation the same, so results are equal bit for bit: `model` takes this module where the checkpoint
is plain and transformers' for everything else, and tests hold the two together. Knows no requests;
the attention and the experts are `model`'s.

Shape legend: T tokens of the step, H hidden size, D size of an attention head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_server.attention import RaggedBatch, paged_attention
from moe_server.checkpoint import Checkpoint
from moe_server.kernels.routing import RoutingPlan, route
from moe_server.plain_mixtral import DEFAULT_EPS, DEFAULT_ROPE_THETA, rope_parameters


@dataclass(frozen=True)
class Output:
    """As transformers names it. No slots: DeepSpeed's hooks look into its `__dict__`."""

    logits: torch.Tensor
    """(1, rows, vocabulary)."""


class Linear(nn.Linear):
    """Without bias and without initial values.

    On the meta device torch imports 800 modules to draw them, a second of a cold start.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weights to whoever loads them."""


class Embedding(nn.Embedding):
    """Without initial values, as `Linear`."""

    def reset_parameters(self) -> None:
        """Leaves the weights to whoever loads them."""


class RmsNorm(nn.Module):
    """Computed in float32, rounded before it is scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        scaled: torch.Tensor = self.weight * (wide * scale).to(x.dtype)
        return scaled


class Rotary(nn.Module):
    """Cosines and sines of the positions, (1, T, D) each; frequencies are float32 always."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self._frequencies = 1.0 / (theta**exponents)

    def forward(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self._frequencies.to(position_ids.device)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Projections around the paged attention of a ragged batch."""

    def __init__(self, checkpoint: Checkpoint, layer: int, sliding_window: int | None) -> None:
        super().__init__()
        self.layer_idx = layer
        self._head_dim = head_dim = checkpoint.head_dim
        self._sliding_window = sliding_window
        hidden, query = checkpoint.hidden_size, checkpoint.num_heads * head_dim
        key_value = checkpoint.num_kv_heads * head_dim
        self.q_proj = Linear(hidden, query)
        self.k_proj = Linear(hidden, key_value)
        self.v_proj = Linear(hidden, key_value)
        self.o_proj = Linear(query, hidden)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ragged_batch: RaggedBatch
    ) -> torch.Tensor:
        by_head = (*x.shape[:-1], -1, self._head_dim)
        query, key, value = (
            projection(x).view(by_head).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended, _ = paged_attention(
            self,
            _rotate(query, cos, sin),
            _rotate(key, cos, sin),
            value,
            None,
            scaling=self._head_dim**-0.5,
            ragged_batch=ragged_batch,
            sliding_window=self._sliding_window,
        )
        output: torch.Tensor = self.o_proj(attended.reshape(*x.shape[:-1], -1))
        return output


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


class Router(nn.Module):
    """Logits, and the plan of which expert computes which rows."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(checkpoint.num_experts, checkpoint.hidden_size))
        self.top_k = checkpoint.num_experts_per_token

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, RoutingPlan]:
        return route(x_TH, self.weight, self.top_k)


class Experts(nn.Module):
    """Where `model` attaches the experts of the cache."""

    run_planned: Callable[[torch.Tensor, RoutingPlan], torch.Tensor]


class SparseBlock(nn.Module):
    """Router and experts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.gate = Router(checkpoint)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TH = x.view(-1, x.shape[-1])
        _, plan = self.gate(x_TH)
        return self.experts.run_planned(x_TH, plan).view(x.shape)


class Layer(nn.Module):
    """Attention and experts, each with its norm and its residual."""

    def __init__(
        self, checkpoint: Checkpoint, layer: int, eps: float, sliding_window: int | None
    ) -> None:
        super().__init__()
        self.self_attn = Attention(checkpoint, layer, sliding_window)
        self.mlp = SparseBlock(checkpoint)
        self.input_layernorm = RmsNorm(checkpoint.hidden_size, eps)
        self.post_attention_layernorm = RmsNorm(checkpoint.hidden_size, eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ragged_batch: RaggedBatch
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, ragged_batch)
        mixed: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return mixed


class Body(nn.Module):
    """All but the output layer."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        super().__init__()
        eps, window = config.get("rms_norm_eps", DEFAULT_EPS), config.get("sliding_window")
        self.embed_tokens = Embedding(checkpoint.vocab_size, checkpoint.hidden_size)
        self.layers = nn.ModuleList(
            Layer(checkpoint, layer, eps, window) for layer in range(checkpoint.num_layers)
        )
        self.norm = RmsNorm(checkpoint.hidden_size, eps)


class Mixtral(nn.Module):
    """The model; built without storage, parameters by transformers' names.

    Args:
        checkpoint: Its sizes; one that `is_plain`.
        config: Its config.json.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Body(checkpoint, config)
            self.lm_head = Linear(checkpoint.hidden_size, checkpoint.vocab_size)
        self.to(getattr(torch, checkpoint.dtype))
        theta = rope_parameters(config).get("rope_theta", DEFAULT_ROPE_THETA)
        self._rotary = Rotary(checkpoint.head_dim, float(theta))
        self._is_tied = checkpoint.is_tied

    def tie_weights(self) -> None:
        """Gives the output layer the embedding's weights where it has none of its own."""
        if self._is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        ragged_batch: RaggedBatch,
    ) -> Output:
        """One step; all tokens in one row, (1, T)."""
        x = self.model.embed_tokens(input_ids)
        cos, sin = self._rotary(position_ids, x.dtype)
        cos, sin = cos[:, None], sin[:, None]
        for layer in self.model.layers:
            x = layer(x, cos, sin, ragged_batch)
        return Output(self.lm_head(self.model.norm(x)[:, logits_to_keep]))
