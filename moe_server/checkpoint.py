"""A Hugging Face checkpoint directory, read without loading it.

Opens config.json and the safetensors headers, checks every tensor that the model needs (present,
whole, of the right dtype and shape) and says where its bytes are. The only place that knows Hugging
Face tensor names. Pure Python: the front door and the light commands read checkpoints too.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import WeightFormat
from moe_server.offload.layout import ExpertId, RecordLayout, Segment

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100 * 2**20
"""The safetensors format's own bound on its header."""

DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
"""safetensors name -> (torch name, bytes of one element)."""

IGNORED_TENSORS = ("rotary_emb.inv_freq", "lm_head.weight")
"""Endings of tensors that may be there without being used: frequencies, which are computed, and the
output layer of a model whose embeddings are tied to it."""

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Their frequencies change with the longest sequence of a forward pass once a length is passed: a
request's tokens would depend on its neighbours. Up to that length they are fixed, so that is the
context we serve."""


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor's bytes are: `nbytes` from `offset` on in `file`, row-major."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    """As safetensors writes it, for example "BF16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The three matrices of one expert; they may be in different files and at any offset."""

    w1: TensorLocation
    w3: TensorLocation
    w2: TensorLocation


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint directory holds."""

    path: Path
    architecture: str
    dtype: str
    """The torch name of the dtype it computes in: that of its tensors."""
    itemsize: int
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
    dense: Mapping[str, TensorLocation]
    """Everything but the experts, by the name of its parameter in the transformers module."""
    experts: Mapping[ExpertId, ExpertTensors]

    @property
    def record_layout(self) -> RecordLayout:
        return RecordLayout(self.hidden_size, self.intermediate_size, WeightFormat(self.dtype))

    def record_segments(self, expert: ExpertId) -> tuple[Segment, ...]:
        """Where the bytes of an expert's record are: straight in the shards, nothing is copied."""
        tensors, layout = self.experts[expert], self.record_layout
        return tuple(
            Segment(tensor.file, tensor.offset, tensor.nbytes, record_offset)
            for tensor, record_offset in (
                (tensors.w1, layout.w1_offset),
                (tensors.w3, layout.w3_offset),
                (tensors.w2, layout.w2_offset),
            )
        )

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.dense.values())

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
        return self.dense_bytes // self.itemsize

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
    config = _read_json(path / "config.json")
    architecture = _architecture(config)
    if config.get("model_type") != "mixtral":
        raise MoeServerError(
            f"{path}: architecture {architecture} (model_type {config.get('model_type')!r}) is not "
            "served.",
            "Use a Mixtral checkpoint (model_type 'mixtral').",
            reason=Reason.UNSUPPORTED,
            field="model",
        )
    sizes = _sizes(config, path)
    tensors = _read_headers(path)
    dtype_name, itemsize = _compute_dtype(tensors, path)
    num_layers, num_experts = sizes["num_hidden_layers"], sizes["num_local_experts"]
    head_dim = sizes["head_dim"]
    experts = {
        ExpertId(layer, expert): _expert_tensors(tensors, layer, expert, sizes, dtype_name, path)
        for layer in range(num_layers)
        for expert in range(num_experts)
    }
    dense = {
        module_name: _take(tensors, name, shape, dtype_name, path)
        for name, module_name, shape in _dense_names(config, sizes)
    }
    _refuse_leftovers(tensors, path)
    return Checkpoint(
        path=path,
        architecture=architecture,
        dtype=DTYPES[dtype_name][0],
        itemsize=itemsize,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=num_layers,
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_token=sizes["num_experts_per_tok"],
        max_context_tokens=_max_context(config, sizes["max_position_embeddings"], path),
        bos_token_id=next(iter(_token_ids(config, "bos_token_id", path / "config.json")), None),
        eos_token_ids=_eos_token_ids(config, path),
        dense=dense,
        experts=experts,
    )


_REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SIZE_DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096 * 32,
}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "(none)"


def _sizes(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    file = path / "config.json"
    sizes = {name: config.get(name) for name in _REQUIRED_SIZES}
    sizes |= {name: config.get(name, default) for name, default in _SIZE_DEFAULTS.items()}
    checked = {name: _at_least_one(name, value, file) for name, value in sizes.items()}
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
    generation = _read_json(file) if file.exists() else {}
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


def _dense_names(
    config: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(checkpoint name, module parameter name, shape) of every tensor that is not an expert's."""
    hidden, vocab = sizes["hidden_size"], sizes["vocab_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    key_value = sizes["num_key_value_heads"] * sizes["head_dim"]
    per_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "block_sparse_moe.gate": (sizes["num_local_experts"], hidden),
    }
    yield "model.embed_tokens.weight", "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(sizes["num_hidden_layers"]):
        for part, shape in per_layer.items():
            name = f"model.layers.{layer}.{part}.weight"
            yield name, name.replace(".block_sparse_moe.", ".mlp."), shape
    yield "model.norm.weight", "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", "lm_head.weight", (vocab, hidden)


def _expert_tensors(
    tensors: dict[str, TensorLocation],
    layer: int,
    expert: int,
    sizes: Mapping[str, int],
    dtype: str,
    path: Path,
) -> ExpertTensors:
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    up = (sizes["intermediate_size"], sizes["hidden_size"])
    return ExpertTensors(
        w1=_take(tensors, f"{prefix}.w1.weight", up, dtype, path),
        w3=_take(tensors, f"{prefix}.w3.weight", up, dtype, path),
        w2=_take(tensors, f"{prefix}.w2.weight", up[::-1], dtype, path),
    )


def _compute_dtype(tensors: Mapping[str, TensorLocation], path: Path) -> tuple[str, int]:
    name = "model.embed_tokens.weight"
    if name not in tensors:
        raise _missing_tensor(name, path)
    dtype = tensors[name].dtype
    if dtype not in DTYPES:
        raise MoeServerError(
            f"{path}: {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}.",
            "Use a float32, float16 or bfloat16 checkpoint.",
            reason=Reason.UNSUPPORTED,
            field="model",
        )
    return dtype, DTYPES[dtype][1]


def _take(
    tensors: dict[str, TensorLocation],
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    path: Path,
) -> TensorLocation:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise _missing_tensor(name, path)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise MoeServerError(
            f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {dtype} {list(shape)}.",
            "config.json and the shards must come from the same checkpoint, in one dtype.",
            field="model",
        )
    expected_bytes = math.prod(shape) * DTYPES[dtype][1]
    if tensor.nbytes != expected_bytes:
        raise MoeServerError(
            f"{tensor.file}: {name} has {tensor.nbytes} bytes, expected {expected_bytes}.",
            "The file's header is damaged: copy the file again.",
            field="model",
        )
    return tensor


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
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MoeServerError(
                f"{path / INDEX_FILE} has no weight_map.", "Copy the file again.", field="model"
            )
        files = sorted({str(name) for name in weight_map.values()})
    elif (path / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        raise MoeServerError(
            f"{path} holds neither {INDEX_FILE} nor {SINGLE_FILE}.",
            "Only safetensors checkpoints are served; convert .bin files with transformers.",
            reason=Reason.NOT_FOUND,
            field="model",
        )
    tensors: dict[str, TensorLocation] = {}
    for name in files:
        if Path(name).name != name:
            raise MoeServerError(
                f"{path / INDEX_FILE} names a file outside its directory: {name!r}.",
                "Copy the file again from a source you trust.",
                field="model",
            )
        tensors.update(_read_header(path / name))
    return tensors


def _read_header(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """Parses one safetensors header: 8 bytes of length, JSON, then the data it points into."""
    try:
        with file.open("rb") as stream:
            if not stream.seekable():
                raise TypeError("it is no regular file")
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            header_bytes = int.from_bytes(stream.read(8), "little")
            data_start = 8 + header_bytes
            if header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
                raise _truncated(file, f"its header says {header_bytes} bytes", file_bytes)
            header = json.loads(stream.read(header_bytes))
            if not isinstance(header, dict):
                raise TypeError("its header is no table")
            for name, entry in header.items():
                if name != "__metadata__":
                    tensor = _location(file, data_start, entry)
                    end = tensor.offset + tensor.nbytes
                    if end > file_bytes:
                        raise _truncated(file, f"{name} ends at byte {end}", file_bytes)
                    yield name, tensor
    except FileNotFoundError:
        raise MoeServerError(
            f"{file} is missing.",
            "Complete the download; every file that the index names must be there.",
            reason=Reason.NOT_FOUND,
            field="model",
        ) from None
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {file}: {error.strerror}.",
            "Check the file and its permissions.",
            field="model",
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoeServerError(
            f"{file} is not a valid safetensors file ({error}).",
            "Copy the file again.",
            field="model",
        ) from None


def _location(file: Path, data_start: int, entry: Mapping[str, Any]) -> TensorLocation:
    start, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if any(type(number) is not int for number in (start, end, *shape)):
        raise TypeError(f"offsets {start}..{end} and shape {shape} are no whole numbers")
    if not isinstance(dtype, str) or not 0 <= start <= end:
        raise ValueError(f"dtype {dtype}, offsets {start}..{end}")
    return TensorLocation(file, data_start + start, end - start, dtype, tuple(shape))


def _truncated(file: Path, claim: str, file_bytes: int) -> MoeServerError:
    return MoeServerError(
        f"{file} is truncated: {claim}, but the file has {file_bytes} bytes.",
        "Copy the file again.",
        field="model",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoeServerError(
            f"{file} is missing.",
            "Give a complete Hugging Face checkpoint directory.",
            reason=Reason.NOT_FOUND,
            field="model",
        ) from None
    except OSError as error:
        raise MoeServerError(
            f"Cannot read {file}: {error.strerror}.",
            "Check the file and its permissions.",
            field="model",
        ) from None
    except (ValueError, RecursionError) as error:
        raise MoeServerError(
            f"{file} is not valid JSON ({error}).", "Copy the file again.", field="model"
        ) from None
    if not isinstance(content, dict):
        raise MoeServerError(
            f"{file} does not hold an object.", "Copy the file again.", field="model"
        )
    return content
