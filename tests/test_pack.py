"""Packing: the bytes, the disk, being killed, and what is refused."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from moe_server import directory, pack_matrices
from moe_server.checkpoint import read_checkpoint
from moe_server.cli import cli
from moe_server.errors import MoeServerError, Reason
from moe_server.pack_journal import JOURNAL_FILE
from moe_server.packed import MANIFEST_FILE
from tests.stores import dense_values, files_of, matrices, pack_as, record
from tests.tiny import Tiny, edit_config

TINY = Tiny(
    dtype="bfloat16",
    layers=2,
    experts=3,
    hidden=64,
    intermediate=40,
    vocab=70,
    heads=2,
    kv_heads=1,
    max_shard="20KB",
)
FORMATS = ["bf16", "int8", "int4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("source") / "model")


# The bytes


@pytest.mark.parametrize("dense_int8", [False, True], ids=["dense as it was", "dense int8"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_weights_come_back(source, tmp_path, format_name, dense_int8):
    report = pack_as(source, tmp_path / "out", format_name, dense_int8=dense_int8)
    plain, store = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    most = {"bf16": 0, "int8": 0.01, "int4": 0.11}[format_name]
    for expert in plain.experts:
        for w, restored in zip(matrices(plain, expert), matrices(store, expert), strict=True):
            assert (restored - w).norm() <= most * w.norm()
            assert (restored - w).abs().max() <= 3 * most * w.abs().max()
    for name, tensor in store.dense.items():
        w, restored = dense_values(plain, name), dense_values(store, name)
        assert (tensor.layout is not None) == (dense_int8 and w.dim() == 2 and ".gate." not in name)
        assert (restored - w).norm() <= (0.01 if tensor.layout else 0) * w.norm()
    assert report.size_bytes == sum(
        file.stat().st_size for file in report.path.glob("*.safetensors")
    )


def test_the_reported_error_is_the_weights(source, tmp_path):
    report = pack_as(source, tmp_path / "out", "int4", group=64, dense_int8=True)
    plain, store = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    errors = report.quality["weight_error"]
    assert list(errors) == ["layer 0", "layer 1", "dense"]
    for layer in range(2):
        pairs = [
            (w, restored)
            for expert in plain.experts
            if expert.layer == layer
            for w, restored in zip(matrices(plain, expert), matrices(store, expert), strict=True)
        ]
        wrong = sum(float((restored - w).double().square().sum()) for w, restored in pairs)
        norm = sum(float(w.double().square().sum()) for w, _ in pairs)
        assert errors[f"layer {layer}"] == pytest.approx(math.sqrt(wrong / norm), rel=1e-3)
    assert 0.003 < errors["dense"] < 0.01


@pytest.mark.parametrize("format_name", FORMATS)
def test_files_are_valid_aligned_and_in_the_order_of_a_pass(source, tmp_path, format_name):
    pack_as(source, tmp_path / "out", format_name, max_file_bytes=30_000)
    files = sorted((tmp_path / "out").glob("experts-*.safetensors"))
    assert len(files) > 1
    stride = read_checkpoint(tmp_path / "out").record_layout.stride_bytes
    names = []
    for number, file in enumerate(files, 1):
        assert file.name == f"experts-{number:05}-of-{len(files):05}.safetensors"
        with file.open("rb") as stream:
            data_start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data_start - 8))
        assert data_start % 4096 == 0
        del header["__metadata__"]
        assert all(entry["data_offsets"][0] % 4096 == 0 for entry in header.values())
        tensors = load_file(file)
        assert all(one.dtype is torch.uint8 and len(one) == stride for one in tensors.values())
        names += header
    assert names == [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for layer in range(2)
        for expert in range(3)
    ]
    dense = {
        name: tensor
        for file in (tmp_path / "out").glob("dense-*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                if ".experts." not in name:
                    assert torch.equal(dense.pop(name), shard.get_tensor(name))
    assert not dense


def test_bf16_keeps_float16_too(tmp_path):
    source = Tiny(**{**vars(TINY), "dtype": "float16"}).write(tmp_path / "model")
    pack_as(source, tmp_path / "out", "bf16")
    plain, store = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    assert store.dtype == "float16"
    for expert in plain.experts:
        assert torch.equal(record(store, expert), record(plain, expert))


def test_a_model_with_tied_embeddings(tmp_path):
    source = Tiny(**{**vars(TINY), "tied": True}).write(tmp_path / "model")
    pack_as(source, tmp_path / "out", "int8", dense_int8=True)
    store = read_checkpoint(tmp_path / "out")
    assert "lm_head.weight" not in store.dense
    assert store.num_parameters == read_checkpoint(source).num_parameters


def test_what_a_server_needs_besides_is_copied(source, tmp_path):
    model = Path(shutil.copytree(source, tmp_path / "model"))
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_text(f"what {name} holds")
    (model / "README.md").write_text("not needed")
    pack_as(model, tmp_path / "out", "int8")
    copied = {name for name in files_of(tmp_path / "out") if not name.endswith(".safetensors")}
    assert copied == {
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        MANIFEST_FILE,
    }
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "what tokenizer.model holds"


def test_the_bytes_depend_on_neither_threads_nor_chunks(source, tmp_path, monkeypatch):
    pack_as(source, tmp_path / "one", "int4")
    monkeypatch.setattr(pack_matrices, "ROWS_ELEMENTS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(5))
    pack_as(source, tmp_path / "other", "int4")
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name != MANIFEST_FILE)


# Being killed


def child(target: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Runs it in a process of its own that is killed; whether it was still at it."""

    def run() -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        work()
        os._exit(0)

    process = child(run)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(source, tmp_path, format_name):
    started = time.monotonic()
    pack_as(source, tmp_path / "whole", format_name, max_file_bytes=30_000)
    duration = time.monotonic() - started
    expected = files_of(tmp_path / "whole")
    draw = random.Random(format_name)
    out = tmp_path / "out"
    kills = 0
    for _ in range(6):
        delay = draw.uniform(0, duration)
        kills += killed_after(
            delay, lambda: pack_as(source, out, format_name, max_file_bytes=30_000)
        )
        if out.exists():
            if kills:
                break
            # It was faster than the first time, which a busy machine had slowed down.
            shutil.rmtree(out)
            duration /= 2
    pack_as(source, out, format_name, force=out.exists(), max_file_bytes=30_000)
    assert kills
    assert files_of(out) == expected
    assert not (tmp_path / "out.partial").exists()


class Interrupted(Exception):  # noqa: N818  no error, a test's stop
    """In place of a kill, at a known moment."""


def interrupt_after(tensors: int) -> Callable[[int], None]:
    count = 0

    def written(_size_bytes: int) -> None:
        nonlocal count
        count += 1
        if count == tensors:
            raise Interrupted

    return written


@pytest.fixture
def begun(source, tmp_path) -> Path:
    """A store of which all dense tensors and some experts are made."""
    with pytest.raises(Interrupted):
        pack_as(source, tmp_path / "out", "int4", written=interrupt_after(len(dense(source)) + 5))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def dense(path: Path) -> dict[str, Any]:
    return dict(read_checkpoint(path).dense)


def test_what_was_made_is_not_made_again(source, begun, monkeypatch):
    made: list[object] = []
    original = pack_matrices.MatrixMaker.record

    def counted(self: Any, expert: Any, target: Any) -> Any:
        made.append(expert)
        return original(self, expert, target)

    monkeypatch.setattr(pack_matrices.MatrixMaker, "record", counted)
    report = pack_as(source, begun, "int4")
    assert report.resumed >= 3
    assert report.resumed + len(made) == report.records == 6


def test_what_was_damaged_meanwhile_is_made_again(source, begun, tmp_path):
    pack_as(source, tmp_path / "whole", "int4")
    file = tmp_path / "out.partial" / "experts-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[4096 + 10] ^= 1
    file.write_bytes(content)
    untouched = pack_as(source, begun, "int4").resumed
    assert untouched == 2
    assert files_of(begun) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("end", [b"", b"\n", b"\0\0\0\0\0"], ids=["cut", "garbage", "zeros"])
def test_a_line_that_is_spoilt_does_not_count(source, begun, tmp_path, end):
    pack_as(source, tmp_path / "whole", "int4")
    journal = tmp_path / "out.partial" / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-5] + end)
    assert pack_as(source, begun, "int4").resumed == 2
    assert files_of(begun) == files_of(tmp_path / "whole")


def test_a_journal_that_is_spoilt_from_its_beginning_is_no_journal(source, begun):
    journal = begun.with_name("out.partial") / JOURNAL_FILE
    journal.write_bytes(b"\0" * 100)
    assert pack_as(source, begun, "int4").resumed == 0


@pytest.mark.parametrize("change", ["format", "group", "source", "config"])
def test_another_run_s_beginning_is_noticed(source, tmp_path, change):
    model = Path(shutil.copytree(source, tmp_path / "model"))
    with pytest.raises(Interrupted):
        pack_as(model, tmp_path / "out", "int4", written=interrupt_after(20))
    if change == "source":
        os.utime(next(model.glob("*.safetensors")), (1, 1))
    if change == "config":
        edit_config(model, rms_norm_eps=1e-4)
    wanted = {"format": ("int8", None), "group": ("int4", 32)}.get(change, ("int4", None))
    with pytest.raises(MoeServerError, match="another run") as caught:
        pack_as(model, tmp_path / "out", wanted[0], group=wanted[1])
    assert ("source" if change in ("source", "config") else "format") in caught.value.message
    assert "--force" in caught.value.remedy
    report = pack_as(model, tmp_path / "out", wanted[0], group=wanted[1], force=True)
    assert report.resumed == 0
    pack_as(model, tmp_path / "whole", wanted[0], group=wanted[1])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_source_that_changes_under_it_gives_no_store(source, tmp_path):
    model = Path(shutil.copytree(source, tmp_path / "model"))

    def change(_store: Path, rounding: Any) -> Any:
        os.utime(next(model.glob("*.safetensors")), (1, 1))
        return rounding

    with pytest.raises(MoeServerError, match="changed while"):
        pack_as(model, tmp_path / "out", "bf16", assess=change)
    assert not (tmp_path / "out").exists()


# The disk


def test_a_disk_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        directory.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(MoeServerError, match="are missing") as caught:
        pack_as(source, tmp_path / "out", "int8")
    assert caught.value.reason is Reason.EXHAUSTED
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))


def test_a_resumed_run_needs_room_for_the_rest_only(source, begun, monkeypatch):
    needed: list[int] = []
    monkeypatch.setattr(
        "moe_server.pack.refuse_small_disk", lambda _path, size, *_: needed.append(size)
    )
    pack_as(source, begun, "int4")
    pack_as(source, begun.with_name("new"), "int4")
    assert 0 < needed[0] < needed[1]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 100 KiB, which has no O_DIRECT either."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", path]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("not allowed to mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_later(
    source, tmp_path, small_disk, monkeypatch
):
    pack_as(source, tmp_path / "whole", "bf16")
    monkeypatch.setattr("moe_server.pack.refuse_small_disk", lambda *_: None)
    with pytest.raises(MoeServerError, match="No space left") as caught:
        pack_as(source, small_disk / "out", "bf16")
    assert caught.value.reason is Reason.EXHAUSTED
    assert "again" in caught.value.remedy
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    report = pack_as(source, small_disk / "out", "bf16")
    assert report.resumed > 0
    assert files_of(small_disk / "out") == files_of(tmp_path / "whole")


def test_a_limit_on_file_sizes_is_said(source, tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            pack_as(source, tmp_path / "out", "bf16")
        except MoeServerError as error:
            os._exit(7 if error.reason is Reason.EXHAUSTED and "too large" in str(error) else 1)
        os._exit(0)

    process = child(limited)
    process.join(60)
    assert process.exitcode == 7


def test_a_disk_without_o_direct_gets_the_same_bytes(source, tmp_path, monkeypatch):
    pack_as(source, tmp_path / "direct", "int8")
    real_open = os.open

    def refuse_direct(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse_direct)
    pack_as(source, tmp_path / "buffered", "int8")
    assert files_of(tmp_path / "buffered") == files_of(tmp_path / "direct")


def test_a_source_that_cannot_be_read_is_said(source, tmp_path, monkeypatch):
    model = Path(shutil.copytree(source, tmp_path / "model"))
    original = pack_matrices.MatrixMaker.record

    def truncated(self: Any, expert: Any, target: Any) -> Any:
        for segment in read_checkpoint(source).record_segments(expert):
            os.truncate(model / segment.file.name, segment.file_offset)
        return original(self, expert, target)

    monkeypatch.setattr(pack_matrices.MatrixMaker, "record", truncated)
    with pytest.raises(MoeServerError, match=r"model-.*\.safetensors"):
        pack_as(model, tmp_path / "out", "int8")


def test_memory_does_not_grow_with_the_model(tmp_path):
    code = """
import sys
from pathlib import Path
from moe_server.synth import SynthSpec, synth
from tests.stores import pack_as
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
sizes = dict(vocab=64, hidden=2048, intermediate=4096, heads=16, kv_heads=4)
synth(Path(sys.argv[1]), SynthSpec(layers=2, experts=5, **sizes), threads=1)
before = peak()
pack_as(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""
    for format_name in ("bf16", "int4"):
        result = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "m", tmp_path / format_name, format_name],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        # Two records of 50 MB in bf16, two matrices of 17 MB; the model has 560 MB.
        assert int(result.stdout) < 250e6


# What is refused


@pytest.mark.parametrize(
    ("format_name", "options", "field"),
    [("int8", {"group": 64}, "group_size"), ("bf16", {"group": 128}, "group_size")],
)
def test_group_sizes_are_int4_s(source, tmp_path, format_name, options, field):
    with pytest.raises(MoeServerError) as caught:
        pack_as(source, tmp_path / "out", format_name, **options)
    assert caught.value.field == field


def test_float32_is_not_what_bf16_means(tmp_path):
    source = Tiny(**{**vars(TINY), "dtype": "float32"}).write(tmp_path / "model")
    with pytest.raises(MoeServerError, match="is float32") as caught:
        pack_as(source, tmp_path / "out", "bf16")
    assert caught.value.reason is Reason.UNSUPPORTED
    pack_as(source, tmp_path / "out", "int8")
    assert read_checkpoint(tmp_path / "out").dtype == "float32"


def test_a_store_is_not_packed_again(source, tmp_path):
    pack_as(source, tmp_path / "one", "bf16")
    with pytest.raises(MoeServerError, match="packed store already"):
        pack_as(tmp_path / "one", tmp_path / "two", "int4")


def test_the_checkpoint_is_not_overwritten(source, tmp_path):
    model = Path(shutil.copytree(source, tmp_path / "models" / "one"))
    before = files_of(model)
    for out in (model, model.parent):
        with pytest.raises(MoeServerError, match="holds the checkpoint itself"):
            pack_as(model, out, "int4", force=True)
    assert files_of(model) == before


def test_nothing_is_replaced_without_force(source, tmp_path):
    out = tmp_path / "out"
    pack_as(source, out, "int8")
    with pytest.raises(MoeServerError, match="not empty"):
        pack_as(source, out, "int4")
    assert read_checkpoint(out).stored.names["expert_format"] == "int8"
    pack_as(source, out, "int4", force=True)
    assert read_checkpoint(out).stored.names["expert_format"] == "int4"
    assert JOURNAL_FILE not in files_of(out)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(source, tmp_path, value):
    model = Path(shutil.copytree(source, tmp_path / "model"))
    checkpoint = read_checkpoint(model)
    segment = checkpoint.record_segments(next(iter(checkpoint.experts)))[1]
    with segment.file.open("r+b") as file:
        file.seek(segment.file_offset)
        file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    with pytest.raises(MoeServerError, match="not finite"):
        pack_as(model, tmp_path / "out", "int4")
    pack_as(model, tmp_path / "kept", "bf16")


# The command


def moe_server(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["pack", *map(str, arguments)])


def test_the_command_reports_quality_and_keeps_it_in_the_manifest(source, tmp_path):
    result = moe_server(source, tmp_path / "out", "--format", "int8", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    quality = figures["quality"]
    assert quality == json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["quality"]
    assert quality["perplexity_ratio"] == quality["perplexity"] / quality["source_perplexity"]
    assert abs(quality["perplexity_ratio"] - 1) < 0.02
    assert 0 < quality["kl_divergence"] < 0.02
    assert 0.9 < quality["top1_agreement"] <= 1
    assert "random tokens" in quality["text"]
    assert figures["expert_format"] == "int8"
    assert figures["records"] == 6


def test_a_store_that_drifts_too_far_gets_no_name(source, tmp_path):
    out = tmp_path / "out"
    result = moe_server(source, out, "--format", "int4", "--max-drift", "0")
    assert result.exit_code == 2
    assert "more than the 0.00% allowed" in result.output
    assert "--format int8" in result.output
    assert not out.exists()
    # Accepted after all: nothing is made again.
    result = moe_server(source, out, "--format", "int4", "--max-drift", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed"] == 6


def test_bf16_needs_no_measurement(source, tmp_path):
    result = moe_server(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "perplexity" not in result.output
    assert "6 in bfloat16" in result.output


def test_measuring_can_be_left_out(source, tmp_path):
    result = moe_server(source, tmp_path / "out", "--format", "int4", "--drift-tokens", 0, "--json")
    assert list(json.loads(result.stdout)["quality"]) == ["weight_error"]


def test_a_text_that_cannot_be_used_is_refused_before_the_work(source, tmp_path):
    result = moe_server(
        source, tmp_path / "out", "--format", "int4", "--text", tmp_path / "missing.txt"
    )
    assert result.exit_code == 2
    assert "no tokenizer" in result.output
    assert not (tmp_path / "out.partial").exists()
