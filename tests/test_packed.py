"""Reading packed stores: what is in them, and the refusal of anything that is not one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from moe_server.budget import READ_BLOCK_BYTES, plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.errors import MoeServerError, Reason
from moe_server.offload.checksum import ChecksumBook
from moe_server.offload.layout import PAGE_BYTES, ExpertId
from moe_server.packed import MANIFEST_FILE
from tests.stores import pack_as, record
from tests.tiny import Tiny, edit_config

TINY = Tiny(
    dtype="bfloat16", layers=2, experts=3, hidden=64, intermediate=40, vocab=70, heads=2, kv_heads=1
)
EXPERTS = "experts-00001-of-00001.safetensors"
DENSE = "dense-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "int4"
    return pack_as(source, out, "int4", group=32, dense_int8=True).path


@pytest.fixture
def store(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "store"))


def edit_manifest(store: Path, **changes: Any) -> None:
    file = store / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(store: Path, *named: object) -> MoeServerError:
    with pytest.raises(MoeServerError) as caught:
        read_checkpoint(store)
    assert caught.value.remedy
    assert caught.value.field == "model"
    for what in named:
        assert str(what) in caught.value.message
    return caught.value


def test_it_describes_the_same_model_in_another_format(source, packed):
    plain, store = read_checkpoint(source), read_checkpoint(packed)
    same = (
        "architecture vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads "
        "head_dim num_experts num_experts_per_token max_context_tokens eos_token_ids dtype "
        "num_parameters num_active_parameters kv_bytes_per_token"
    )
    for name in same.split():
        assert getattr(store, name) == getattr(plain, name), name
    assert store.stored.names == {
        "dtype": "bfloat16",
        "expert_format": "int4",
        "group_columns": 32,
        "dense_format": "int8",
    }
    assert store.record_layout.group_columns == 32
    assert {name: one.shape for name, one in store.dense.items()} == {
        name: one.shape for name, one in plain.dense.items()
    }
    quantised = {name for name, one in store.dense.items() if one.layout is not None}
    assert quantised == {
        name for name, one in plain.dense.items() if len(one.shape) == 2 and ".gate." not in name
    }


def test_a_record_is_one_range_of_whole_pages_in_the_order_of_a_pass(packed):
    store = read_checkpoint(packed)
    end = None
    for expert in sorted(store.experts):
        [segment] = store.record_segments(expert)
        assert segment.file_offset % 4096 == 0
        assert segment.nbytes == store.record_layout.stride_bytes
        assert segment.record_offset == 0
        assert end in (None, segment.file_offset)
        end = segment.file_offset + segment.nbytes


def test_the_checksums_are_those_of_every_byte(packed):
    store = read_checkpoint(packed)
    book = ChecksumBook(store.checksums)
    for expert in store.experts:
        [segment] = store.record_segments(expert)
        content = record(store, expert).numpy()
        assert book.mismatch(segment.file, segment.file_offset, content.data) is None
        content[-1] ^= 1
        assert book.mismatch(segment.file, segment.file_offset, content.data) is not None
    for tensor in store.dense.values():
        content = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert book.mismatch(tensor.file, tensor.offset, memoryview(content)) is None
    assert len(store.checksums) == len(store.experts) + len(store.dense)


def test_a_plain_checkpoint_has_no_checksums(source):
    assert read_checkpoint(source).checksums == {}


# Refusals


def test_another_version_of_the_format(store):
    edit_manifest(store, format_version=2)
    error = refusal(store, MANIFEST_FILE, "format_version is 2")
    assert error.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_format": "int3"},
        {"expert_format": "float16"},
        {"dtype": "int8"},
        {"dtype": None},
        {"group_columns": 48},
        {"group_columns": "32"},
        {"dense_format": "int4"},
        {"files": {"../model.safetensors": 10}},
        {"files": {EXPERTS: "10"}},
        {"files": [EXPERTS]},
        {"checksum": {"algorithm": "md5", "piece_bytes": 2097152}},
        {"checksums": {"model.norm.weight": "not hexadecimal"}},
        {"checksums": []},
    ],
)
def test_a_manifest_that_makes_no_sense(store, changes):
    edit_manifest(store, **changes)
    refusal(store, MANIFEST_FILE, "damaged")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_manifest_that_is_no_manifest(store, content):
    (store / MANIFEST_FILE).write_bytes(content)
    refusal(store, MANIFEST_FILE)


@pytest.mark.parametrize("key", ["dtype", "files", "checksum", "checksums", "source", "quality"])
def test_a_manifest_that_lacks_something(store, key):
    content = json.loads((store / MANIFEST_FILE).read_text())
    del content[key]
    (store / MANIFEST_FILE).write_text(json.dumps(content))
    refusal(store, MANIFEST_FILE, key)


@pytest.mark.parametrize("name", [EXPERTS, DENSE, "config.json"])
def test_a_missing_file(store, name):
    (store / name).unlink()
    assert refusal(store, name, "missing").reason is Reason.UNAVAILABLE


@pytest.mark.parametrize("name", [EXPERTS, DENSE])
@pytest.mark.parametrize("lost", [1, 4096])
def test_a_truncated_file(store, name, lost):
    content = (store / name).read_bytes()
    (store / name).write_bytes(content[:-lost])
    refusal(store, name, "truncated")


def test_integers_with_an_activation_that_no_kernel_has(source, store, tmp_path):
    edit_config(store, hidden_act="gelu")
    assert refusal(store, "'gelu'", "int4").reason is Reason.UNSUPPORTED
    plain = Path(shutil.copytree(source, tmp_path / "gelu"))
    edit_config(plain, hidden_act="gelu")
    with pytest.raises(MoeServerError, match="'gelu'"):
        pack_as(plain, tmp_path / "out", "int8")
    assert read_checkpoint(pack_as(plain, tmp_path / "out", "bf16").path)


def test_a_file_with_something_behind_it(store):
    with (store / EXPERTS).open("ab") as file:
        file.write(b"x")
    refusal(store, EXPERTS, MANIFEST_FILE)


def test_a_file_that_the_manifest_does_not_name(store):
    files = json.loads((store / MANIFEST_FILE).read_text())["files"]
    del files[DENSE]
    edit_manifest(store, files=files)
    refusal(store, "tensor model.")


def test_missing_checksums(store):
    sums = json.loads((store / MANIFEST_FILE).read_text())["checksums"]
    name = "model.layers.1.block_sparse_moe.experts.2"
    edit_manifest(store, checksums={**sums, name: ""})
    refusal(store, MANIFEST_FILE, name, "0 checksums")


def test_a_store_of_another_group_size(store):
    edit_manifest(store, group_columns=128)
    refusal(store, EXPERTS, "block_sparse_moe.experts.0")


def test_a_config_of_another_model(store):
    edit_config(store, num_local_experts=4)
    refusal(store, "experts.3")
    edit_config(store, num_local_experts=2)
    refusal(store, "gate")
    edit_config(store, num_local_experts=3, intermediate_size=4000)
    refusal(store, "experts.0")


def test_a_record_that_is_not_on_a_page(store):
    """Readers would fall back to copying every record."""
    content = (store / EXPERTS).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    moved = (header_bytes + 64).to_bytes(8, "little") + content[8 : 8 + header_bytes]
    (store / EXPERTS).write_bytes(moved + b" " * 64 + content[8 + header_bytes :])
    edit_manifest(
        store,
        files={
            name: (store / name).stat().st_size
            for name in json.loads((store / MANIFEST_FILE).read_text())["files"]
        },
    )
    with safe_open(store / EXPERTS, "np") as file:
        assert len(file.keys()) == 6
    refusal(store, EXPERTS, "not on a page")


# Plans


def test_a_plan_counts_what_is_stored(source, packed):
    config = load_config(flags={"device_memory": "min", "dense_backend": "resident"}, environ={})
    store, plain = read_checkpoint(packed), read_checkpoint(source)
    plan = plan_memory(config, store)
    assert plan.slot_bytes == store.record_layout.stride_bytes
    assert plan.expert_bytes == store.record_layout.weight_bytes
    assert plan.dense_bytes == sum(
        tensor.nbytes if tensor.layout is None else tensor.layout.nbytes
        for tensor in store.dense.values()
    )
    # Its activations are quantised, and nothing is read through windows: records are aligned.
    assert store.is_page_aligned
    assert not plain.is_page_aligned
    windows = config.read_threads * (READ_BLOCK_BYTES + 2 * PAGE_BYTES)
    assert plan.workspace_bytes > plan_memory(config, plain).workspace_bytes - windows
    assert plan.kv_bytes == plan_memory(config, plain).kv_bytes


@pytest.mark.parametrize(
    ("wanted", "refused"), [("checkpoint", False), ("int4", False), ("int8", True), ("bf16", True)]
)
def test_expert_format_asserts_what_a_store_holds(packed, wanted, refused):
    config = load_config(flags={"expert_format": wanted, "dense_backend": "resident"}, environ={})
    if not refused:
        plan_memory(config, read_checkpoint(packed))
        return
    with pytest.raises(MoeServerError, match="stores its experts in int4") as caught:
        plan_memory(config, read_checkpoint(packed))
    assert caught.value.field == "expert_format"
    assert f"--format {wanted}" in caught.value.remedy


def test_a_plain_checkpoint_is_bf16_and_no_int4(source):
    plain = read_checkpoint(source)
    plan_memory(load_config(flags={"expert_format": "bf16"}, environ={}), plain)
    with pytest.raises(MoeServerError, match="expert_format is int4") as caught:
        plan_memory(load_config(flags={"expert_format": "int4"}, environ={}), plain)
    assert "moe-server pack" in caught.value.remedy


def test_an_expert_can_be_found_by_its_name(packed):
    store = read_checkpoint(packed)
    [segment] = store.record_segments(ExpertId(1, 2))
    with safe_open(segment.file, "np") as file:
        content = file.get_tensor("model.layers.1.block_sparse_moe.experts.2")
    assert content.tobytes() == record(store, ExpertId(1, 2)).numpy().tobytes()
