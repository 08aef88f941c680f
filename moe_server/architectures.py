"""The architectures that are served: what their checkpoints name things, and which sizes they have.

One table of facts about Hugging Face's config.json and tensor names; `checkpoint` reads by it. How
an architecture computes is transformers' business (`transformers_module`), or `mixtral`'s for the
plain one. Pure Python.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_server.offload.layout import ExpertId


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model_type."""

    model_type: str
    context_default: int
    """max_position_embeddings, where config.json leaves it out."""
    expert_matrices: tuple[str, str, str] | None = None
    """What gate, up and down are called in an expert; None: there are no experts."""
    sparse_block: str = "mlp"
    """What the checkpoint calls a layer's sparse block, which is `mlp` in the module."""
    num_experts_key: str = "num_experts"
    expert_size_key: str = "intermediate_size"
    """Which key of config.json is the experts' width."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Of sizes that config.json may leave out."""
    head_norms: bool = False
    """Queries and keys are normalised head by head."""
    whole_norms: bool = False
    """Queries and keys are normalised, all heads together."""

    @property
    def is_sparse(self) -> bool:
        return self.expert_matrices is not None

    def hub_name(self, parameter: str) -> str:
        """The checkpoint's name of a dense tensor, from its parameter's in the module."""
        return parameter.replace(".mlp.", f".{self.sparse_block}.")

    def expert_names(self, expert: ExpertId) -> tuple[str, str, str]:
        """The checkpoint's names of an expert's gate, up and down."""
        assert self.expert_matrices is not None
        owner = f"model.layers.{expert.layer}.{self.sparse_block}.experts.{expert.expert}"
        gate, up, down = (f"{owner}.{matrix}.weight" for matrix in self.expert_matrices)
        return gate, up, down

    def dense_parameters(
        self, config: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(parameter name in the module, shape) of every tensor that is not an expert's.

        Args:
            config: config.json.
            sizes: By the names that `checkpoint` gives them.
        """
        hidden, vocab = sizes["hidden_size"], sizes["vocab_size"]
        yield "model.embed_tokens.weight", (vocab, hidden)
        per_layer = dict(self._layer_parameters(config, sizes))
        for layer in range(sizes["num_hidden_layers"]):
            for part, shape in per_layer.items():
                yield f"model.layers.{layer}.{part}", shape
        yield "model.norm.weight", (hidden,)
        if not config.get("tie_word_embeddings", False):
            yield "lm_head.weight", (vocab, hidden)

    def _layer_parameters(
        self, config: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, head = sizes["hidden_size"], sizes["head_dim"]
        query = sizes["num_attention_heads"] * head
        key_value = sizes["num_key_value_heads"] * head
        yield "input_layernorm.weight", (hidden,)
        yield "post_attention_layernorm.weight", (hidden,)
        attention = {
            "q_proj": (query, hidden),
            "k_proj": (key_value, hidden),
            "v_proj": (key_value, hidden),
            "o_proj": (hidden, query),
        }
        yield from _linear("self_attn", attention, has_bias=bool(config.get("attention_bias")))
        if self.head_norms:
            yield "self_attn.q_norm.weight", (head,)
            yield "self_attn.k_norm.weight", (head,)
        if self.whole_norms:
            yield "self_attn.q_norm.weight", (query,)
            yield "self_attn.k_norm.weight", (key_value,)
        if self.is_sparse:
            yield "mlp.gate.weight", (sizes["num_local_experts"], hidden)
            return
        width = sizes["intermediate_size"]
        products = {
            "gate_proj": (width, hidden),
            "up_proj": (width, hidden),
            "down_proj": (hidden, width),
        }
        yield from _linear("mlp", products, has_bias=bool(config.get("mlp_bias")))


def _linear(
    owner: str, products: Mapping[str, tuple[int, int]], *, has_bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in products.items():
        yield f"{owner}.{name}.weight", shape
        if has_bias:
            yield f"{owner}.{name}.bias", shape[:1]


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

ARCHITECTURES = {
    one.model_type: one
    for one in (
        Architecture(
            "mixtral",
            context_default=4096 * 32,
            expert_matrices=("w1", "w3", "w2"),
            sparse_block="block_sparse_moe",
            num_experts_key="num_local_experts",
            defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        Architecture(
            "qwen3_moe",
            context_default=32768,
            expert_matrices=_PROJECTIONS,
            expert_size_key="moe_intermediate_size",
            defaults={"num_local_experts": 128, "num_experts_per_tok": 8},
            head_norms=True,
        ),
        Architecture(
            "olmoe",
            context_default=4096,
            expert_matrices=_PROJECTIONS,
            defaults={"num_local_experts": 64, "num_experts_per_tok": 8},
            whole_norms=True,
        ),
        Architecture("mistral", context_default=4096 * 32),
        Architecture("llama", context_default=2048),
    )
}
