"""A Hugging Face checkpoint directory, or a packed store of one, read without loading it.

Opens config.json and the safetensors headers, checks every tensor that the model needs (present,
whole, of the right dtype and shape) and says where its bytes are. With `packed`, the only place
that knows Hugging Face tensor names. Pure Python: the front door and the light commands read
checkpoints too.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_server.architectures import ARCHITECTURES, Architecture
from moe_server.errors import MoeServerError, Reason
from moe_server.json_file import read_json
from moe_server.kernels.formats import GROUP_COLUMNS, MatrixLayout, WeightFormat
from moe_server.offload.checksum import PIECE_BYTES
from moe_server.offload.layout import PAGE_BYTES, ExpertId, RecordLayout, Segment
from moe_server.packed import (
    BYTES_DTYPE,
    MANIFEST_FILE,
    Manifest,
    StoreFormat,
    read_headers,
    read_manifest,
    record_name,
)
from moe_server.plain_mixtral import is_plain
from moe_server.safetensors_file import TensorLocation, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES = {WeightFormat.FLOAT32: "F32", WeightFormat.FLOAT16: "F16", WeightFormat.BFLOAT16: "BF16"}
"""What safetensors calls the dtypes that a model may compute in."""

IGNORED_TENSORS = ("rotary_emb.inv_freq", "lm_head.weight")
"""Endings of tensors that may be there without being used: frequencies, which are computed, and the
output layer of a model whose embeddings are tied to it."""

EMBEDDING = "model.embed_tokens"
OUTPUT = "lm_head"
"""Modules at the two ends, by their names in the transformers module."""

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Their frequencies change with the longest sequence of a forward pass once a length is passed: a
request's tokens would depend on its neighbours. Up to that length they are fixed, so that is the
context we serve."""


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor that is no expert's, and where its bytes are."""

    location: TensorLocation
    """`dtype` and `shape` as stored: of a quantised one, its bytes."""
    shape: tuple[int, ...]
    """Of the weights."""
    layout: MatrixLayout | None
    """How a quantised one lies in its bytes; None: row-major, in the model's dtype."""

    @property
    def file(self) -> Path:
        return self.location.file

    @property
    def offset(self) -> int:
        return self.location.offset

    @property
    def nbytes(self) -> int:
        return self.location.nbytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint directory holds."""

    path: Path
    architecture: str
    kind: Architecture
    """How its files name things."""
    is_plain: bool
    """Whether `mixtral` serves it; otherwise transformers' module does."""
    stored: StoreFormat
    """How its weights are stored; a plain checkpoint's all have its dtype."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_token: int
    max_context_tokens: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dense: Mapping[str, DenseTensor]
    """Everything but the experts, by the name of its parameter in the transformers module."""
    experts: Mapping[ExpertId, tuple[Segment, ...]]
    """Where each record is: in one place in a packed store, else w1, w3 and w2, anywhere."""
    checksums: Mapping[tuple[Path, int], int]
    """XXH3 of each piece of every tensor, by file and offset, as `offload.checksum` takes them;
    empty where nobody wrote any down."""

    @property
    def dtype(self) -> str:
        """The torch name of the dtype it computes in."""
        return self.stored.dtype.value

    @property
    def itemsize(self) -> int:
        """Bytes of one element of that dtype."""
        return self.stored.dtype.itemsize

    @property
    def record_layout(self) -> RecordLayout:
        return self.stored.record_layout(self.hidden_size, self.intermediate_size)

    def record_segments(self, expert: ExpertId) -> tuple[Segment, ...]:
        """Where the bytes of an expert's record are: straight in the files, nothing is copied."""
        return self.experts[expert]

    @property
    def is_page_aligned(self) -> bool:
        """Whether every record can be read straight into its place."""
        return all(
            (part.file_offset | part.nbytes | part.record_offset) % PAGE_BYTES == 0
            for parts in self.experts.values()
            for part in parts
        )

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.dense.values())

    @property
    def routers(self) -> list[DenseTensor]:
        """The weights that choose experts, by layer; none where there are no experts."""
        names = (f"model.layers.{layer}.mlp.gate.weight" for layer in range(self.num_layers))
        return [self.dense[name] for name in names] if self.experts else []

    @property
    def embedding(self) -> DenseTensor:
        """The token embedding's weights."""
        return self.dense[f"{EMBEDDING}.weight"]

    @property
    def embedding_layout(self) -> MatrixLayout:
        """How the token embedding lies in its bytes, quantised or not."""
        rows, columns = self.embedding.shape
        return self.embedding.layout or MatrixLayout(rows, columns, self.stored.dtype)

    @property
    def is_tied(self) -> bool:
        """Whether the output layer's weights are the embedding's."""
        return f"{OUTPUT}.weight" not in self.dense

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def num_parameters(self) -> int:
        return self._num_dense_parameters + len(self.experts) * self._num_expert_parameters

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token uses: the dense ones and its experts of every layer."""
        active = self.num_layers * self.num_experts_per_token
        return self._num_dense_parameters + active * self._num_expert_parameters

    @property
    def _num_dense_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.dense.values())

    @property
    def _num_expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint directory; touches headers only, no weights.

    Raises:
        MoeServerError: Anything that would make loading fail later: a missing or truncated file, an
            architecture we do not serve, a tensor that is missing or has another dtype or shape.
    """
    if not os.path.isdir(path):  # noqa: PTH112  is_dir() raises where a name is too long
        raise MoeServerError(
            f"{path} is not a directory.",
            "Give a Hugging Face checkpoint directory, or `demo` for the embedded model.",
            reason=Reason.NOT_FOUND,
            field="model",
        )
    config = read_json(path / "config.json")
    architecture = _architecture(config)
    model_type = config.get("model_type")
    kind = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        raise MoeServerError(
            f"{path}: architecture {architecture} (model_type {model_type!r}) is not served.",
            f"Use a checkpoint whose model_type is one of {', '.join(ARCHITECTURES)}.",
            reason=Reason.UNSUPPORTED,
            field="model",
        )
    _refuse_mixed_layers(config, path)
    sizes = _sizes(config, kind, path)
    manifest = read_manifest(path) if (path / MANIFEST_FILE).exists() else None
    if manifest is None:
        tensors = _read_headers(path)
        dtype = _compute_dtype(tensors, path)
        stored = StoreFormat(dtype, dtype, GROUP_COLUMNS)
        read_expert = _expert_in_shards
    else:
        tensors = read_headers(path, manifest)
        stored = manifest.format
        read_expert = _expert_in_store
        refuse_integer_activation(config, stored, path)
    checksums = {} if manifest is None else _checksums(manifest, tensors)
    source = _Source(path, kind, tensors, stored, sizes)
    experts = {
        ExpertId(layer, expert): read_expert(source, ExpertId(layer, expert))
        for layer in range(sizes["num_hidden_layers"])
        for expert in range(sizes["num_local_experts"])
    }
    dense = {
        parameter: _dense_tensor(source, kind.hub_name(parameter), shape)
        for parameter, shape in kind.dense_parameters(config, sizes)
    }
    _refuse_leftovers(tensors, path)
    return Checkpoint(
        path=path,
        architecture=architecture,
        kind=kind,
        is_plain=is_plain(config),
        stored=stored,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        num_experts=sizes["num_local_experts"],
        num_experts_per_token=sizes["num_experts_per_tok"],
        max_context_tokens=_max_context(config, sizes["max_position_embeddings"], path),
        bos_token_id=next(iter(_token_ids(config, "bos_token_id", path / "config.json")), None),
        eos_token_ids=_eos_token_ids(config, path),
        dense=dense,
        experts=experts,
        checksums=checksums,
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """What the files hold, while it is being taken apart."""

    path: Path
    kind: Architecture
    tensors: dict[str, TensorLocation]
    """Those that nothing has taken yet."""
    stored: StoreFormat
    sizes: Mapping[str, int]

    @property
    def dtype(self) -> str:
        """As safetensors writes it."""
        return DTYPES[self.stored.dtype]


_REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_EXPERT_SIZES = ("num_local_experts", "num_experts_per_tok")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "(none)"


def _sizes(config: Mapping[str, Any], kind: Architecture, path: Path) -> dict[str, int]:
    """Every size, by Mixtral's names; a model without experts has none of them."""
    file = path / "config.json"
    sizes = {name: config.get(name) for name in _REQUIRED_SIZES}
    sizes[kind.expert_size_key] = config.get(kind.expert_size_key)
    name = "max_position_embeddings"
    sizes[name] = config.get(name, kind.context_default)
    if kind.is_sparse:
        for name, default in kind.defaults.items():
            sizes[name] = config.get(name, default)
        # transformers writes either of two names.
        if kind.num_experts_key in config:
            sizes["num_local_experts"] = config[kind.num_experts_key]
    checked = {name: _at_least_one(name, value, file) for name, value in sizes.items()}
    checked["intermediate_size"] = checked[kind.expert_size_key]
    if not kind.is_sparse:
        checked |= dict.fromkeys(_EXPERT_SIZES, 0)
    heads = checked["num_attention_heads"]
    derived = {"num_key_value_heads": heads, "head_dim": checked["hidden_size"] // heads}
    for name, default in derived.items():
        value = config.get(name)
        checked[name] = _at_least_one(name, default if value is None else value, file)
    if checked["num_experts_per_tok"] > checked["num_local_experts"]:
        experts = checked["num_local_experts"]
        raise _bad_config(
            file,
            "num_experts_per_tok",
            checked["num_experts_per_tok"],
            f"at most {experts} experts",
        )
    if heads % checked["num_key_value_heads"]:
        key_value_heads = checked["num_key_value_heads"]
        raise _bad_config(
            file,
            "num_key_value_heads",
            key_value_heads,
            f"a divisor of the {heads} attention heads",
        )
    if checked["head_dim"] % 2:
        raise _bad_config(file, "head_dim", checked["head_dim"], "an even number to rotate")
    if config.get("sliding_window") is not None:
        _at_least_one("sliding_window", config["sliding_window"], file)
    return checked


def _refuse_mixed_layers(config: Mapping[str, Any], path: Path) -> None:
    """Every layer has experts, or none has."""
    for name, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        value = config.get(name)
        if value is not None and value != usual:
            raise MoeServerError(
                f"{path / 'config.json'}: {name} is {value!r}: some layers have experts and some "
                "have none, which is not served.",
                f"Use a checkpoint whose {name} is {usual!r}.",
                reason=Reason.UNSUPPORTED,
                field="model",
            )


def _at_least_one(name: str, value: object, file: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad_config(file, name, value, "a whole number of at least 1")
    return value


def _bad_config(file: Path, name: str, value: object, expected: str) -> MoeServerError:
    return MoeServerError(
        f"{file}: {name} is {value!r}, expected {expected}.",
        f"Restore the checkpoint's own {file.name}.",
        field="model",
    )


def _max_context(config: Mapping[str, Any], max_positions: int, path: Path) -> int:
    file = path / "config.json"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _bad_config(file, "rope_parameters", rope, "a table")
    if rope.get("rope_type", rope.get("type", "default")) not in BATCH_DEPENDENT_ROPE:
        return max_positions
    name = "original_max_position_embeddings"
    original = rope.get(name, config.get(name))
    return (
        max_positions
        if original is None
        else min(max_positions, _at_least_one(name, original, file))
    )


def _eos_token_ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    # generate() of transformers reads generation_config.json, where it exists, and so do we.
    file = path / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    if "eos_token_id" in generation:
        return _token_ids(generation, "eos_token_id", file)
    return _token_ids(config, "eos_token_id", path / "config.json")


def _token_ids(config: Mapping[str, Any], name: str, file: Path) -> tuple[int, ...]:
    """The tokens that a key names: none, one or a list of them."""
    value = config.get(name)
    token_ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in token_ids):
        raise _bad_config(file, name, value, "token ids")
    return tuple(token_ids)


def _expert_in_shards(source: _Source, expert: ExpertId) -> tuple[Segment, ...]:
    layout = source.stored.record_layout(
        source.sizes["hidden_size"], source.sizes["intermediate_size"]
    )
    up = (layout.intermediate_size, layout.hidden_size)
    places = (up, layout.w1_offset), (up, layout.w3_offset), (up[::-1], layout.w2_offset)
    segments = []
    names = source.kind.expert_names(expert)
    for name, (shape, record_offset) in zip(names, places, strict=True):
        tensor = _take(source, name, source.dtype, shape)
        segments.append(Segment(tensor.file, tensor.offset, tensor.nbytes, record_offset))
    return tuple(segments)


def _expert_in_store(source: _Source, expert: ExpertId) -> tuple[Segment, ...]:
    layout = source.stored.record_layout(
        source.sizes["hidden_size"], source.sizes["intermediate_size"]
    )
    name = record_name(expert)
    tensor = _take(source, name, BYTES_DTYPE, (layout.stride_bytes,))
    if tensor.offset % PAGE_BYTES:
        raise MoeServerError(
            f"{tensor.file}: {name} begins at byte {tensor.offset}, which is not on a page of "
            f"{PAGE_BYTES} bytes.",
            "Copy the store again, or pack the checkpoint again.",
            field="model",
        )
    return (Segment(tensor.file, tensor.offset, tensor.nbytes, 0),)


def _dense_tensor(source: _Source, name: str, shape: tuple[int, ...]) -> DenseTensor:
    layout = source.stored.dense_layout(name, shape)
    if layout is None:
        location = _take(source, name, source.dtype, shape)
    else:
        location = _take(source, name, BYTES_DTYPE, (layout.nbytes,))
    return DenseTensor(location, shape, layout)


def _checksums(
    manifest: Manifest, tensors: Mapping[str, TensorLocation]
) -> dict[tuple[Path, int], int]:
    checksums: dict[tuple[Path, int], int] = {}
    for name, tensor in tensors.items():
        pieces = manifest.checksums.get(name, ())
        if len(pieces) != -(-tensor.nbytes // PIECE_BYTES):
            raise MoeServerError(
                f"{tensor.file.parent / MANIFEST_FILE} has {len(pieces)} checksums of {name}, "
                f"which has {tensor.nbytes} bytes.",
                "Copy the store again, or pack the checkpoint again.",
                field="model",
            )
        for number, checksum in enumerate(pieces):
            checksums[tensor.file, tensor.offset + number * PIECE_BYTES] = checksum
    return checksums


def _compute_dtype(tensors: Mapping[str, TensorLocation], path: Path) -> WeightFormat:
    name = f"{EMBEDDING}.weight"
    if name not in tensors:
        raise _missing_tensor(name, path)
    dtype = tensors[name].dtype
    for compute, stored in DTYPES.items():
        if dtype == stored:
            return compute
    raise MoeServerError(
        f"{path}: {name} has dtype {dtype}, expected one of {', '.join(DTYPES.values())}.",
        "Use a float32, float16 or bfloat16 checkpoint.",
        reason=Reason.UNSUPPORTED,
        field="model",
    )


def _take(source: _Source, name: str, dtype: str, shape: tuple[int, ...]) -> TensorLocation:
    tensor = source.tensors.pop(name, None)
    if tensor is None:
        raise _missing_tensor(name, source.path)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise MoeServerError(
            f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {dtype} {list(shape)}.",
            "config.json and the shards must come from the same checkpoint, in one dtype.",
            field="model",
        )
    itemsize = 1 if dtype == BYTES_DTYPE else source.stored.dtype.itemsize
    expected_bytes = math.prod(shape) * itemsize
    if tensor.nbytes != expected_bytes:
        raise MoeServerError(
            f"{tensor.file}: {name} has {tensor.nbytes} bytes, expected {expected_bytes}.",
            "The file's header is damaged: copy the file again.",
            field="model",
        )
    return tensor


def refuse_integer_activation(config: Mapping[str, Any], stored: StoreFormat, path: Path) -> None:
    """Integer experts are computed with SiLU and with nothing else.

    Args:
        config: The model's config.json.
        stored: How its weights are stored, or are to be.
        path: Where it is.

    Raises:
        MoeServerError: The model wants another activation between them.
    """
    activation = config.get("hidden_act", "silu")
    if stored.experts.is_integer and activation != "silu":
        raise MoeServerError(
            f"{path}: hidden_act is {activation!r}; {stored.experts.value} experts are computed "
            "with 'silu' only.",
            "Serve the checkpoint in its own dtype, or packed with --format bf16.",
            reason=Reason.UNSUPPORTED,
            field="model",
        )


def _refuse_leftovers(tensors: Mapping[str, TensorLocation], path: Path) -> None:
    """A model that is only a part of the checkpoint would answer, and answer nonsense."""
    unused = [name for name in tensors if not name.endswith(IGNORED_TENSORS)]
    if unused:
        raise MoeServerError(
            f"{path}: {len(unused)} tensors are not part of the model that config.json describes, "
            f"for example {unused[0]}.",
            "config.json and the shards must come from the same checkpoint.",
            field="model",
        )


def _missing_tensor(name: str, path: Path) -> MoeServerError:
    return MoeServerError(
        f"{path}: tensor {name} is in none of the safetensors files.",
        "Complete the download; every file that the index names must be there.",
        reason=Reason.NOT_FOUND,
        field="model",
    )


def _read_headers(path: Path) -> dict[str, TensorLocation]:
    if (path / INDEX_FILE).exists():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MoeServerError(
                f"{path / INDEX_FILE} has no weight_map.", "Copy the file again.", field="model"
            )
        files = sorted({str(name) for name in weight_map.values()})
    elif (path / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        message = f"{path} holds neither {INDEX_FILE} nor {SINGLE_FILE}."
        if any(path.glob("*.bin")):
            raise MoeServerError(
                message,
                "Only safetensors checkpoints are served; convert .bin files with transformers.",
                reason=Reason.NOT_FOUND,
                field="model",
            )
        raise MoeServerError(
            message, "Complete the download.", reason=Reason.UNAVAILABLE, field="model"
        )
    tensors: dict[str, TensorLocation] = {}
    for name in files:
        if Path(name).name != name:
            raise MoeServerError(
                f"{path / INDEX_FILE} names a file outside its directory: {name!r}.",
                "Copy the file again from a source you trust.",
                field="model",
            )
        tensors.update(read_header(path / name))
    return tensors
