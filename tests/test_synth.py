"""Synthetic checkpoints: what is in them, and that they appear whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_server import progress as progress_module
from moe_server import synth_weights
from moe_server.checkpoint import read_checkpoint
from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.quantised import dequantise
from moe_server.offload import checksum
from moe_server.offload.checksum import ChecksumBook
from moe_server.offload.layout import ExpertId
from moe_server.synth import synth, synth_command
from moe_server.synth_spec import SynthSpec
from moe_server.synth_weights import Dtype
from tests.stores import dense_values, matrices, record

TINY = SynthSpec(
    layers=2, hidden=32, intermediate=48, experts=4, heads=4, kv_heads=2, vocab=64, seed=7
)
# Tensors that end inside a generator step, inside a pair of weights and inside a block.
ODD = replace(TINY, hidden=36, intermediate=37, experts=3, heads=9, kv_heads=3, vocab=61)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def data_offset(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [(Dtype.BF16, torch.bfloat16), (Dtype.FP16, torch.float16), (Dtype.FP32, torch.float32)],
)
def test_transformers_loads_every_key(
    tmp_path: Path, dtype: Dtype, torch_dtype: torch.dtype
) -> None:
    report = synth(tmp_path / "m", replace(TINY, dtype=dtype))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == torch_dtype
    assert model.config.architectures == ["MixtralForCausalLM"]
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.config.sliding_window is None
    assert model.generation_config.eos_token_id == 2
    assert sum(weight.numel() for weight in model.parameters()) == report.parameters
    query = tensors_of(tmp_path / "m")["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, query)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads only wait for one another on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_torch_thread")
def test_text_is_varied_and_experts_are_balanced_at_full_depth(tmp_path: Path) -> None:
    spec = replace(TINY, layers=32, hidden=128, intermediate=96, experts=8, vocab=512)
    synth(tmp_path / "m", spec)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, out: chosen.append(out[-1]))
    prompt = torch.arange(3, 259).unsqueeze(0)
    with torch.inference_mode():
        output = model(prompt, output_hidden_states=True)
        shares = torch.stack([ids.flatten().bincount(minlength=8) / ids.numel() for ids in chosen])
        generated = model.generate(prompt[:, :8], max_new_tokens=16, do_sample=False)
    assert output.logits.isfinite().all()
    assert 0.5 < output.logits.float().std() < 2
    assert max(state.float().std() for state in output.hidden_states) < 10
    assert shares.min() > 0.04  # of 0.125
    assert shares.max() < 0.25
    assert len(set(generated[0, 8:].tolist())) > 8


def test_weights_are_normal_and_uncorrelated(tmp_path: Path) -> None:
    spec = replace(TINY, hidden=256, intermediate=1024, dtype=Dtype.FP32)
    synth(tmp_path / "m", spec)
    tensors = tensors_of(tmp_path / "m")
    w1 = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"] * 16
    w2 = tensors["model.layers.0.block_sparse_moe.experts.0.w2.weight"] * 32
    for weight in (w1, w2):
        # Five standard errors of 2^18 samples.
        assert abs(weight.mean()) < 0.01
        assert abs(weight.std() - 1) < 0.01
        assert abs((weight**4).mean() - 3) < 0.1
    flat = w1.flatten()
    for distance in (1, 2, 8, 256):
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 0.01
    assert abs((w1 * w2.view_as(w1)).mean()) < 0.01
    assert (tensors["model.norm.weight"] == 1).all()


def test_real_dimensions() -> None:
    spec = SynthSpec()
    assert spec.parameters == 46_702_792_704
    shards = spec.shards()
    assert next(iter(shards)) == f"model-00001-of-{len(shards):05}.safetensors"
    assert sum(shard.data_bytes for shard in shards.values()) == spec.data_bytes
    for shard in shards.values():
        assert shard.data_bytes <= 5e9
        header = json.loads(shard.header[8:])
        del header["__metadata__"]
        assert all(entry["data_offsets"][0] % 4096 == 0 for entry in header.values())


def test_files_are_aligned_indexed_and_complete(tmp_path: Path) -> None:
    spec = replace(ODD, max_shard_bytes=20_000)
    report = synth(tmp_path / "m", spec)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert report.files == len(files) > 3
    assert report.size_bytes == sum(file.stat().st_size for file in files)
    assert index["metadata"]["total_size"] == spec.data_bytes == 2 * report.parameters
    for file in files:
        assert data_offset(file) % 4096 == 0
        held = {name for name, holder in index["weight_map"].items() if holder == file.name}
        assert held == load_file(file).keys()
        if len(held) > 1:
            assert file.stat().st_size - data_offset(file) <= 20_000


@pytest.mark.parametrize("dtype", Dtype)
def test_bytes_depend_on_neither_shards_nor_threads_nor_blocks(
    tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(ODD, dtype=dtype)
    synth(tmp_path / "one", spec, threads=1)
    synth(tmp_path / "sharded", replace(spec, max_shard_bytes=10_000))
    monkeypatch.setattr(synth_weights, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(synth_weights, "CHUNK_STEPS", 3)
    synth(tmp_path / "blocks", spec, threads=5)
    one = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "blocks" / "model.safetensors").read_bytes()
    assert same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "sharded"))


def test_the_seed_decides(tmp_path: Path) -> None:
    synth(tmp_path / "a", TINY)
    synth(tmp_path / "b", replace(TINY, seed=8))
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)
    # Pinned: a release must not change what a seed means.
    digest = hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "0113273192cc61f371831bf77b5bb6b5ad5fce0744e543a6f50c3be80159c232"


def test_a_disk_without_o_direct_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synth(tmp_path / "direct", TINY)
    real_open = os.open

    def refuse_direct(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse_direct)
    synth(tmp_path / "buffered", TINY)
    direct, buffered = (tmp_path / name / "model.safetensors" for name in ("direct", "buffered"))
    assert direct.read_bytes() == buffered.read_bytes()


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ({"heads": 5, "kv_heads": 5}, "hidden", "multiple of 10"),
        ({"heads": 32, "kv_heads": 2}, "hidden", "multiple of 64"),
        ({"kv_heads": 3}, "kv_heads", "divide 4"),
        ({"top_k": 5}, "top_k", "at most 4"),
        ({"layers": 0}, "layers", "larger"),
        ({"vocab": 2}, "vocab", "larger"),
        ({"seed": -1}, "seed", "larger"),
        ({"max_shard_bytes": 0}, "max_shard_bytes", "larger"),
    ],
)
def test_dimensions_no_mixtral_has(change: dict[str, int], field: str, remedy: str) -> None:
    with pytest.raises(MoeServerError) as caught:
        replace(TINY, **change)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert remedy in caught.value.remedy


def test_a_small_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(90_000_000_000))
    with pytest.raises(
        MoeServerError, match=r"needs 93\.41 GB.*90\.00 GB free: 3\.41 GB"
    ) as caught:
        synth(tmp_path / "m", SynthSpec())
    assert caught.value.reason is Reason.EXHAUSTED
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MoeServerError, match="No space left") as caught:
        synth(tmp_path / "m", TINY)
    assert caught.value.reason is Reason.EXHAUSTED
    assert not list(tmp_path.iterdir())


def interrupt(_size_bytes: int) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "m", TINY, written=interrupt)
    assert not list(tmp_path.iterdir())
    synth(tmp_path / "m", TINY)
    before = tensors_of(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "m", replace(TINY, seed=8), written=interrupt)
    assert same(tensors_of(tmp_path / "m"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_synthetic_checkpoint_is_replaced(tmp_path: Path) -> None:
    synth(tmp_path / "m", replace(TINY, max_shard_bytes=10_000))
    partial = tmp_path / "m.partial"  # of a run that was killed
    partial.mkdir()
    (partial / "synth.json").write_text("{}")
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (partial / "replaced").mkdir()
    synth(tmp_path / "m", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "synth.json",
    }  # fmt: skip


def test_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(MoeServerError, match=r"not a synthetic checkpoint.*--force"):
        synth(tmp_path / "m", TINY)
    assert (tmp_path / "m" / "thesis.tex").exists()
    synth(tmp_path / "m", TINY, force=True)
    assert not (tmp_path / "m" / "thesis.tex").exists()
    with pytest.raises(MoeServerError, match="file or a mount point"):
        synth(tmp_path / "m" / "config.json", TINY, force=True)
    with pytest.raises(MoeServerError, match="file or a mount point"):
        synth(Path("/"), TINY, force=True)


def test_two_runs_at_once(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    other = os.open(tmp_path / "m.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(MoeServerError, match="Another process") as caught:
        synth(tmp_path / "m", TINY)
    os.close(other)
    assert caught.value.reason is Reason.UNAVAILABLE
    synth(tmp_path / "m", TINY)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from moe_server.synth import SynthSpec, synth;"
        "synth(Path(sys.argv[1]), SynthSpec(layers=1, vocab=3, experts=1, top_k=1,"
        " hidden=4096, intermediate=9000), threads=16);"
        "print(Path('/proc/self/status').read_text())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m"], check=True, capture_output=True, text=True
    )
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 300e6
    # Not getrusage: a child starts with its parent's peak, and pytest has torch loaded.
    peak = next(line for line in result.stdout.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) * 1024 < 400e6


# Packed stores


PACKED = replace(ODD, expert_format="int4", dense_format="int8", group_size=32)


@pytest.mark.parametrize("expert_format", ["int8", "int4"])
def test_a_random_store_has_the_weights_of_a_random_checkpoint(
    tmp_path: Path, expert_format: str
) -> None:
    """Not the same ones: as large, as many, and nothing where there is no weight."""
    spec = replace(
        TINY, hidden=256, intermediate=1000, expert_format=expert_format, dense_format="int8"
    )
    synth(tmp_path / "m", spec)
    store = read_checkpoint(tmp_path / "m")
    assert store.num_parameters == spec.parameters
    assert store.stored == spec.stored
    for expert in store.experts:
        for w, columns in zip(matrices(store, expert), (256, 256, 1000), strict=True):
            assert w.shape[1] == columns
            assert abs(w.std() * columns**0.5 - 1) < 0.02
            assert abs(w.mean() * columns**0.5) < 0.02
    for name, tensor in store.dense.items():
        w = dense_values(store, name)
        if tensor.layout is None:
            assert w.dim() == 1 or ".gate." in name
            continue
        fan_in = 1 if "embed" in name else w.shape[1]
        damping = spec.layers if "o_proj" in name else 1
        assert abs(w.std() * (fan_in * damping) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize("expert_format", ["int8", "int4"])
def test_what_only_fills_a_block_or_a_group_weighs_nothing(
    tmp_path: Path, expert_format: str
) -> None:
    synth(tmp_path / "m", replace(PACKED, expert_format=expert_format))
    store = read_checkpoint(tmp_path / "m")
    layout = store.record_layout.w13
    whole = replace(layout, rows=layout.num_blocks * 16, columns=layout.padded_columns)
    assert (whole.rows, whole.columns) > (layout.rows, layout.columns)
    for expert in store.experts:
        content = record(store, expert)
        w = dequantise(content[: layout.nbytes], whole)
        assert (w[layout.rows :] == 0).all()
        assert (w[:, layout.columns :] == 0).all()
        assert (content[store.record_layout.w2_offset + store.record_layout.w2.nbytes :] == 0).all()


@pytest.mark.parametrize("expert_format", ["int8", "int4"])
def test_a_store_s_bytes_depend_on_neither_files_nor_threads_nor_blocks(
    tmp_path: Path, expert_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(PACKED, expert_format=expert_format)
    synth(tmp_path / "one", spec, threads=1)
    synth(tmp_path / "files", replace(spec, max_shard_bytes=10_000))
    monkeypatch.setattr(synth_weights, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(checksum, "PIECE_BYTES", 4096)
    synth(tmp_path / "blocks", spec, threads=5)
    one = tensors_of(tmp_path / "one")
    assert same(one, tensors_of(tmp_path / "files"))
    assert same(one, tensors_of(tmp_path / "blocks"))
    synth(tmp_path / "seed", replace(spec, seed=8))
    other = tensors_of(tmp_path / "seed")
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_checksums_are_of_pieces_whatever_the_blocks(tmp_path: Path) -> None:
    spec = replace(TINY, hidden=1024, intermediate=2048, heads=8, experts=1, top_k=1)
    synth(tmp_path / "m", replace(spec, layers=1, expert_format="int8"))
    store = read_checkpoint(tmp_path / "m")
    book = ChecksumBook(store.checksums)
    [segment] = store.record_segments(ExpertId(0, 0))
    content = record(store, ExpertId(0, 0)).numpy()
    assert len(content) > 3 * checksum.PIECE_BYTES
    assert book.mismatch(segment.file, segment.file_offset, content.data) is None
    content[checksum.PIECE_BYTES] ^= 1
    found = book.mismatch(segment.file, segment.file_offset, content.data)
    assert found == segment.file_offset + checksum.PIECE_BYTES


def test_a_full_size_mixtral_in_int4() -> None:
    spec = SynthSpec(expert_format="int4")
    assert spec.parameters == SynthSpec().parameters
    assert 26e9 < spec.data_bytes < 29e9
    smaller = SynthSpec(expert_format="int4", dense_format="int8")
    assert 1.5e9 < spec.data_bytes - smaller.data_bytes < 1.7e9


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"dense_format": "int8"}, "dense_format"), ({"group_size": 48}, "group_size")],
)
def test_formats_that_cannot_be(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MoeServerError) as caught:
        replace(TINY, **changes)
    assert caught.value.field == field


TINY_FLAGS = ["--layers=1", "--hidden=16", "--intermediate=8", "--heads=2", "--kv-heads=1"]


def test_the_command_reports_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        synth_command, [str(tmp_path / "m"), *TINY_FLAGS, "--dtype", "fp16", "--json"]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    spec = json.loads((tmp_path / "m" / "synth.json").read_text())
    assert spec["dtype"] == "fp16"
    assert figures["bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert figures["bytes_per_second"] == pytest.approx(figures["bytes"] / figures["seconds"])
    assert figures["parameters"] == sum(t.numel() for t in tensors_of(tmp_path / "m").values())


def test_the_command_logs_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_S", 0)
    result = CliRunner().invoke(
        synth_command, [str(tmp_path / "m"), *TINY_FLAGS, "--max-shard-size", "1kB"]
    )
    assert result.exit_code == 0, result.output
    assert "synth: 0.0 of 0.0 GB" in result.stderr
    assert "parameters" in result.stdout


def test_the_command_refuses_a_bad_size(tmp_path: Path) -> None:
    for size in ("5 bananas", "min"):
        result = CliRunner().invoke(synth_command, [str(tmp_path / "m"), "--max-shard-size", size])
        assert result.exit_code == 2
        assert "is not a size" in result.output
