"""Writes the GGUF files that llama.cpp is measured with. Runs in llama.cpp's environment.

    write_gguf.py convert CHECKPOINT OUT     a Mixtral checkpoint's own weights, in bf16
    write_gguf.py quantize GGUF OUT          Q4_0, by llama.cpp's own quantiser
    write_gguf.py random CONFIG.JSON OUT     Q4_0 of random blocks

One layer's stacked matrix is in memory at a time. The models have no text: token ids only.
"""

import ctypes
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

PARTS = {"w1": "gate", "w2": "down", "w3": "up"}
NIBBLE_STD = math.sqrt((16**2 - 1) / 12)
"""Of -8..7, equally likely."""
Q6_K_SCALE = 32
BLOCKS = {GGMLQuantizationType.Q4_0: (32, 18), GGMLQuantizationType.Q6_K: (256, 210)}
"""Weights in a block, and its bytes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `make` gives its bytes when they are written."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        weights = math.prod(self.shape)
        if self.kind in BLOCKS:
            block, size = BLOCKS[self.kind]
            return weights // block * size
        return weights * (4 if self.kind == GGMLQuantizationType.F32 else 2)


def main() -> None:
    """Does what the command line says."""
    command, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    partial = out.with_name(out.name + ".partial")
    if command == "quantize":
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        params.nthread = 2
        if llama_cpp.llama_model_quantize(
            str(source).encode(), str(partial).encode(), ctypes.byref(params)
        ):
            raise SystemExit(f"llama.cpp could not quantise {source}")
    else:
        config_file = source if command == "random" else source / "config.json"
        config = json.loads(config_file.read_text())
        maker = Random(config) if command == "random" else Converted(source, config)
        _write(partial, config, list(_tensors(config, maker)), maker.file_type)
    partial.rename(out)


class Converted:
    """Tensors of a safetensors checkpoint, as llama.cpp's own converter lays them out."""

    file_type = LlamaFileType.MOSTLY_BF16

    def __init__(self, checkpoint: Path, config: dict[str, Any]) -> None:
        self._config = config
        self._tensors: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            data = np.memmap(file, np.uint8, "r")
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            for name, entry in json.loads(data[8:start].tobytes()).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    self._tensors[name] = (data[start + first : start + last], entry["shape"])

    def matrix(self, name: str, shape: tuple[int, ...], source: str) -> Tensor:
        def make() -> np.ndarray:
            data = self._bf16(source)
            heads = {
                "q_proj": self._config["num_attention_heads"],
                "k_proj": self._config["num_key_value_heads"],
            }.get(source.split(".")[-2])
            if heads:  # rotary pairs are neighbours in GGUF and half a head apart on the hub
                data = data.reshape(heads, 2, -1, shape[-1]).swapaxes(1, 2)
            return np.ascontiguousarray(data).reshape(shape).view(np.uint8)

        return Tensor(name, shape, GGMLQuantizationType.BF16, make)

    def float32(self, name: str, shape: tuple[int, ...], source: str) -> Tensor:
        def make() -> np.ndarray:
            return (self._bf16(source).astype(np.uint32) << 16).view(np.float32).reshape(shape)

        return Tensor(name, shape, GGMLQuantizationType.F32, make)

    def stacked(self, name: str, shape: tuple[int, ...], sources: list[str]) -> Tensor:
        def make() -> np.ndarray:
            stack = np.empty(shape, np.uint16)
            for index, source in enumerate(sources):
                stack[index] = self._bf16(source)
            return stack.view(np.uint8)

        return Tensor(name, shape, GGMLQuantizationType.BF16, make)

    output = matrix

    def _bf16(self, source: str) -> np.ndarray:
        data, shape = self._tensors[source]
        return data.view(np.uint16).reshape(shape)


class Random:
    """Random blocks with the spread that `moe-server synth` gives its weights."""

    file_type = LlamaFileType.MOSTLY_Q4_0

    def __init__(self, config: dict[str, Any]) -> None:
        self._layers = config["num_hidden_layers"]
        self._rng = np.random.default_rng(0)
        self._pool = np.frombuffer(self._rng.bytes(2**26), np.uint8)

    def matrix(self, name: str, shape: tuple[int, ...], source: str) -> Tensor:
        def make() -> np.ndarray:
            std = 1.0 if "embed" in source else shape[-1] ** -0.5
            if "o_proj" in source:
                std /= math.sqrt(self._layers)
            blocks = self._bytes(math.prod(shape) // 32 * 18).reshape(-1, 18)
            _scale(blocks[:, :2], std / NIBBLE_STD)
            return blocks.reshape(*shape[:-1], -1)

        return Tensor(name, shape, GGMLQuantizationType.Q4_0, make)

    def stacked(self, name: str, shape: tuple[int, ...], sources: list[str]) -> Tensor:
        return self.matrix(name, shape, sources[0])

    def output(self, name: str, shape: tuple[int, ...], _source: str) -> Tensor:
        """Q6_K, as the quantiser chooses for the output layer."""

        def make() -> np.ndarray:
            blocks = self._bytes(math.prod(shape) // 256 * 210).reshape(-1, 210)
            blocks[:, 192:208] = Q6_K_SCALE
            scale = shape[-1] ** -0.5 / (Q6_K_SCALE * math.sqrt((64**2 - 1) / 12))
            _scale(blocks[:, 208:], scale)
            return blocks.reshape(*shape[:-1], -1)

        return Tensor(name, shape, GGMLQuantizationType.Q6_K, make)

    def float32(self, name: str, shape: tuple[int, ...], _source: str) -> Tensor:
        def make() -> np.ndarray:
            if len(shape) == 1:
                return np.ones(shape, np.float32)
            return self._rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

        return Tensor(name, shape, GGMLQuantizationType.F32, make)

    def _bytes(self, count: int) -> np.ndarray:
        """The pool over and over, from a place drawn anew: no two tensors are alike."""
        start = int(self._rng.integers(len(self._pool)))
        return np.resize(np.roll(self._pool, start), count)


def _scale(bytes_: np.ndarray, scale: float) -> None:
    """Sets float16 scales, with the signs that the bytes happen to have.

    A block's integers lie around -0.5. With scales of one sign all weights would lean to one side,
    which every matrix multiplies: soon all tokens look alike and want the same experts.
    """
    low, high = np.float16(scale).tobytes()
    bytes_[:, 0] = low
    bytes_[:, 1] = bytes_[:, 1] & 0x80 | high


def _tensors(config: dict[str, Any], make: Converted | Random) -> Iterator[Tensor]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    vocab, experts = config["vocab_size"], config["num_local_experts"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield make.matrix("token_embd.weight", (vocab, hidden), "model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        block, source = f"blk.{layer}", f"model.layers.{layer}"
        attention, moe = f"{source}.self_attn", f"{source}.block_sparse_moe"
        for norm, origin in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            yield make.float32(f"{block}.{norm}.weight", (hidden,), f"{source}.{origin}.weight")
        for part, rows in (("q", hidden), ("k", key_value), ("v", key_value)):
            name = f"{block}.attn_{part}.weight"
            yield make.matrix(name, (rows, hidden), f"{attention}.{part}_proj.weight")
        name = f"{block}.attn_output.weight"
        yield make.matrix(name, (hidden, hidden), f"{attention}.o_proj.weight")
        name = f"{block}.ffn_gate_inp.weight"
        yield make.float32(name, (experts, hidden), f"{moe}.gate.weight")
        for part, meaning in PARTS.items():
            shape = (experts, hidden, wide) if part == "w2" else (experts, wide, hidden)
            sources = [f"{moe}.experts.{expert}.{part}.weight" for expert in range(experts)]
            yield make.stacked(f"{block}.ffn_{meaning}_exps.weight", shape, sources)
    yield make.float32("output_norm.weight", (hidden,), "model.norm.weight")
    yield make.output("output.weight", (vocab, hidden), "lm_head.weight")


def _write(
    out: Path, config: dict[str, Any], tensors: list[Tensor], file_type: LlamaFileType
) -> None:
    writer = GGUFWriter(out, "llama")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("no_vocab")
    for tensor in tensors:
        shape = tensor.shape
        if tensor.kind in BLOCKS:  # quantised shapes are given in bytes
            block, size = BLOCKS[tensor.kind]
            shape = (*shape[:-1], shape[-1] // block * size)
        dtype = np.dtype(np.uint8 if tensor.kind in BLOCKS else np.float16)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = tensor.make()
        assert data.nbytes == tensor.nbytes, (tensor.name, data.nbytes, tensor.nbytes)
        writer.write_tensor_data(data)
    writer.close()


if __name__ == "__main__":
    main()
