"""What a synthetic checkpoint consists of: its dimensions, tensors, files and config.json.

Pure facts, derived from a handful of numbers. Knows the hub's names for a Mixtral, but not how
bytes are made or written. `synth` uses it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from moe_server.errors import MoeServerError
from moe_server.kernels.formats import GROUP_CHOICES, GROUP_COLUMNS, WeightFormat
from moe_server.offload.layout import ExpertId
from moe_server.packed import StoreFormat, group_files, record_name
from moe_server.synth_records import RandomMatrix, RandomRecord
from moe_server.synth_weights import Dtype, Fillable, RandomTensor, Shard


@dataclass(frozen=True, slots=True)
class SynthSpec:
    """What to make; the defaults are Mixtral 8x7B's dimensions.

    Raises:
        MoeServerError: Dimensions that no Mixtral can have; `field` names the option.
    """

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    """Width of one expert."""
    experts: int = 8
    top_k: int = 2
    """Experts each token goes to."""
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    dtype: Dtype = Dtype.BF16
    max_shard_bytes: int = 5 * 10**9
    """Data in one file; a larger tensor gets a file of its own."""
    seed: int = 0
    expert_format: str = "checkpoint"
    """int8 or int4: a packed store instead of a checkpoint."""
    group_size: int = GROUP_COLUMNS
    """Columns that share a scale, in int4."""
    dense_format: str = "checkpoint"
    """int8: the dense matrices of a packed store are quantised, too."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = {"seed": 0, "vocab": 3}.get(name, 1)
            if isinstance(value, int) and value < least:
                raise MoeServerError(
                    f"{name} = {value}, expected at least {least}.",
                    "Give a larger number.",
                    field=name,
                )
        if self.hidden % (2 * self.heads):
            raise MoeServerError(
                f"hidden = {self.hidden} does not give {self.heads} heads of an even size, which "
                "rotary embeddings need.",
                f"Use a --hidden that is a multiple of {2 * self.heads}, or other --heads.",
                field="hidden",
            )
        if self.heads % self.kv_heads:
            raise MoeServerError(
                f"heads = {self.heads} cannot share kv_heads = {self.kv_heads} evenly.",
                f"Use --kv-heads that divide {self.heads}.",
                field="kv_heads",
            )
        if self.top_k > self.experts:
            raise MoeServerError(
                f"top_k = {self.top_k} of experts = {self.experts}.",
                f"Use a --top-k of at most {self.experts}, or more --experts.",
                field="top_k",
            )

        if self.group_size not in GROUP_CHOICES:
            raise MoeServerError(
                f"group_size = {self.group_size}, expected one of {GROUP_CHOICES}.",
                "Use another --group-size.",
                field="group_size",
            )
        if self.dense_format != "checkpoint" and self.stored is None:
            raise MoeServerError(
                f"dense_format = {self.dense_format} in a plain checkpoint.",
                "Add --expert-format int8 or int4, which makes a packed store.",
                field="dense_format",
            )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.elements for tensor in self.tensors())

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.data_bytes for shard in self.shards().values())

    @property
    def stored(self) -> StoreFormat | None:
        """The format of the packed store; None: a plain checkpoint is to be made."""
        if self.expert_format == "checkpoint":
            return None
        return StoreFormat(
            WeightFormat(self.dtype.torch_name),
            WeightFormat(self.expert_format),
            self.group_size,
            dense_int8=self.dense_format == "int8",
        )

    def tensors(self) -> Iterator[RandomTensor]:
        """Every tensor under its hub name, in the order of the forward pass.

        Each matrix keeps the variance of what it multiplies (std = 1/sqrt(fan in)): activations
        stay within half precision at any depth, and logits have a standard deviation of 1. Only
        attention's output is smaller, by sqrt(layers): what it averages over a context is common
        to all tokens and adds up. Left alone, the tokens of a text are alike by layer 32 (cosine
        0.59 instead of 0.00) and crowd the same experts (shares of 3-31 % instead of 10-15 %).
        """

        def matrix(name: str, rows: int, columns: int, damping: int = 1) -> RandomTensor:
            shape, std = (rows, columns), (columns * damping) ** -0.5
            return RandomTensor(f"{name}.weight", shape, std, self.dtype)

        def norm(name: str) -> RandomTensor:
            return RandomTensor(f"{name}.weight", (self.hidden,), None, self.dtype)

        kv_width = self.hidden // self.heads * self.kv_heads
        embedding = (self.vocab, self.hidden)
        yield RandomTensor("model.embed_tokens.weight", embedding, 1.0, self.dtype)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield norm(f"{prefix}.input_layernorm")
            yield matrix(f"{prefix}.self_attn.q_proj", self.hidden, self.hidden)
            yield matrix(f"{prefix}.self_attn.k_proj", kv_width, self.hidden)
            yield matrix(f"{prefix}.self_attn.v_proj", kv_width, self.hidden)
            yield matrix(f"{prefix}.self_attn.o_proj", self.hidden, self.hidden, self.layers)
            yield norm(f"{prefix}.post_attention_layernorm")
            moe = f"{prefix}.block_sparse_moe"
            yield matrix(f"{moe}.gate", self.experts, self.hidden)
            for expert in range(self.experts):
                yield matrix(f"{moe}.experts.{expert}.w1", self.intermediate, self.hidden)
                yield matrix(f"{moe}.experts.{expert}.w2", self.hidden, self.intermediate)
                yield matrix(f"{moe}.experts.{expert}.w3", self.intermediate, self.hidden)
        yield norm("model.norm")
        yield matrix("lm_head", self.vocab, self.hidden)

    def shards(self) -> dict[str, Shard]:
        """File name -> what it holds, filled in order as the hub's files are."""
        stored = self.stored
        if stored is not None:
            files = self._files("dense", self._stored_dense(stored))
            files |= self._files("experts", self._records(stored))
        else:
            files = self._files("model", self.tensors())
            if len(files) == 1:
                files = {"model.safetensors": files.popitem()[1]}
        return {name: Shard(tensors, self.seed) for name, tensors in files.items()}

    def _files(self, kind: str, tensors: Iterator[Fillable]) -> dict[str, list[Fillable]]:
        return group_files(kind, tensors, lambda one: one.entry.nbytes, self.max_shard_bytes)

    def _stored_dense(self, stored: StoreFormat) -> Iterator[Fillable]:
        for tensor in self.tensors():
            if ".experts." in tensor.name:
                continue
            layout = stored.dense_layout(tensor.name, tensor.shape)
            if layout is None or tensor.std is None:
                yield tensor
            else:
                matrix = RandomMatrix(0, layout, tensor.std)
                yield RandomRecord(tensor.name, (matrix,), layout.nbytes)

    def _records(self, stored: StoreFormat) -> Iterator[Fillable]:
        layout = stored.record_layout(self.hidden, self.intermediate)
        matrices = (
            RandomMatrix(layout.w1_offset, layout.w13, self.hidden**-0.5),
            RandomMatrix(layout.w3_offset, layout.w13, self.hidden**-0.5),
            RandomMatrix(layout.w2_offset, layout.w2, self.intermediate**-0.5),
        )
        for layer in range(self.layers):
            for expert in range(self.experts):
                name = record_name(ExpertId(layer, expert))
                yield RandomRecord(name, matrices, layout.stride_bytes)

    def config(self) -> dict[str, object]:
        """The config.json, as transformers >= 5.17 reads it."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": self.dtype.torch_name,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }
