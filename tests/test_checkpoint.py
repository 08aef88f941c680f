"""Whatever is wrong with a checkpoint: one MoeServerError, with the file and a remedy."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moe_server.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_checkpoint
from moe_server.errors import MoeServerError, Reason
from moe_server.offload.layout import ExpertId
from tests.tiny import Tiny, edit_config

SMALL = Tiny(
    layers=1, experts=2, hidden=32, intermediate=16, vocab=64, heads=2, kv_heads=1, head_dim=16
)
EMBEDDING = "model.embed_tokens.weight"
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return SMALL.write(tmp_path_factory.mktemp("checkpoint") / "single")


@pytest.fixture(scope="module")
def written_sharded(tmp_path_factory) -> Path:
    tiny = Tiny(**{**vars(SMALL), "max_shard": "10KB"})
    return tiny.write(tmp_path_factory.mktemp("checkpoint") / "sharded")


@pytest.fixture
def single(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def sharded(written_sharded, tmp_path) -> Path:
    return Path(shutil.copytree(written_sharded, tmp_path / "model"))


def refusal(path: Path, *named: object) -> MoeServerError:
    """The error that reading raises; it names what is at fault and says what to do."""
    with pytest.raises(MoeServerError) as caught:
        read_checkpoint(path)
    error = caught.value
    assert error.remedy
    assert error.field == "model"
    for what in named:
        assert str(what) in error.message
    return error


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """A shard's header and data."""
    content = file.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:data_start]), content[data_start:]


def join(file: Path, header: bytes | dict[str, Any], data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@contextmanager
def edited_header(file: Path) -> Iterator[dict[str, Any]]:
    header, data = split(file)
    yield header
    join(file, header, data)


def assert_sound(checkpoint: Checkpoint) -> None:
    """Every tensor is where a reader can get it."""
    places = [(tensor.file, tensor.offset, tensor.nbytes) for tensor in checkpoint.dense.values()]
    places += [
        (part.file, part.file_offset, part.nbytes)
        for expert in checkpoint.experts
        for part in checkpoint.record_segments(expert)
    ]
    for file, offset, nbytes in places:
        assert type(offset) is int
        assert type(nbytes) is int
        assert offset >= 8
        assert offset + nbytes <= file.stat().st_size
    for tensor in checkpoint.dense.values():
        assert all(type(size) is int for size in tensor.shape)
    assert type(checkpoint.max_context_tokens) is int
    assert checkpoint.max_context_tokens >= 1
    assert all(type(token) is int and token >= 0 for token in checkpoint.eos_token_ids)
    assert checkpoint.num_heads % checkpoint.num_kv_heads == 0
    assert isinstance(checkpoint.architecture, str)


# What is right


@pytest.mark.parametrize(
    "tiny",
    [SMALL, Tiny(tied=True), Tiny(dtype="bfloat16", layers=3, experts=5, max_shard="50KB")],
    ids=["single", "tied", "sharded bfloat16"],
)
def test_it_finds_what_transformers_wrote(tiny, tmp_path):
    checkpoint = read_checkpoint(tiny.write(tmp_path))
    assert_sound(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert checkpoint.num_parameters == model.num_parameters()
    per_expert = 3 * tiny.hidden * tiny.intermediate
    idle = tiny.layers * (tiny.experts - tiny.top_k) * per_expert
    assert checkpoint.num_active_parameters == model.num_parameters() - idle
    assert checkpoint.dtype == tiny.dtype
    assert checkpoint.architecture == "MixtralForCausalLM"
    for name, parameter in model.named_parameters():
        if "experts." not in name:
            assert checkpoint.dense[name].shape == tuple(parameter.shape)
    assert len(checkpoint.experts) == tiny.layers * tiny.experts


def test_a_record_is_the_expert_s_bytes(written_sharded):
    checkpoint = read_checkpoint(written_sharded)
    expert = ExpertId(0, 1)
    layout = checkpoint.record_layout
    record = bytearray(layout.stride_bytes)
    for part in checkpoint.record_segments(expert):
        content = part.file.read_bytes()[part.file_offset : part.file_offset + part.nbytes]
        record[part.record_offset : part.record_offset + part.nbytes] = content
    weight_map = json.loads((written_sharded / INDEX_FILE).read_text())["weight_map"]
    for name, offset in (
        ("w1", layout.w1_offset),
        ("w3", layout.w3_offset),
        ("w2", layout.w2_offset),
    ):
        key = f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"
        with safe_open(written_sharded / weight_map[key], "np") as shard:
            expected = shard.get_tensor(key).tobytes()
        assert record[offset : offset + len(expected)] == expected


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (None, None, ()),
        (2, None, (2,)),
        (0, None, (0,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"temperature": 0.5}, (2,)),
        (2, {"eos_token_id": None}, ()),
    ],
)
def test_end_of_sequence_tokens(single, config, generation_config, expected):
    edit_config(single, eos_token_id=config)
    (single / "generation_config.json").unlink(missing_ok=True)
    if generation_config is not None:
        (single / "generation_config.json").write_text(json.dumps(generation_config))
    assert read_checkpoint(single).eos_token_ids == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 512),
        ({"rope_type": "default", "rope_theta": 1e6}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 100),
        ({"type": "longrope", "original_max_position_embeddings": 4096}, 512),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_context_ends_where_rope_would_depend_on_the_batch(single, key, rope, expected):
    edit_config(single, rope_parameters=None)
    edit_config(single, **{key: rope})
    assert read_checkpoint(single).max_context_tokens == expected


def test_longrope_may_keep_its_original_context_beside_it(single):
    rope = {"rope_type": "longrope"}
    edit_config(single, rope_parameters=rope, original_max_position_embeddings=128)
    assert read_checkpoint(single).max_context_tokens == 128


def test_sizes_that_config_leaves_out_are_those_of_mixtral(single):
    edit_config(single, num_key_value_heads=None, head_dim=None)
    # As many heads for keys as for queries: the shape of k_proj says otherwise.
    assert "k_proj" in refusal(single).message


# What is wrong with the directory


def test_missing_directories_and_files(single):
    assert refusal(single / "nowhere", single / "nowhere").reason is Reason.NOT_FOUND
    (single / SINGLE_FILE).unlink()
    assert refusal(single, single, SINGLE_FILE).reason is Reason.UNAVAILABLE, "may be on its way"
    (single / "pytorch_model.bin").touch()
    assert "convert" in refusal(single, single, SINGLE_FILE).remedy
    (single / "config.json").unlink()
    assert refusal(single, single / "config.json").reason is Reason.UNAVAILABLE


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
def test_a_text_that_is_still_being_copied_is_waited_for(sharded, name):
    text = (sharded / name).read_bytes().rstrip()
    for kept in (0, 1, len(text) // 2, len(text) - 1):
        (sharded / name).write_bytes(text[:kept])
        assert refusal(sharded, sharded / name).reason is Reason.UNAVAILABLE, kept
    (sharded / name).write_bytes(b"{,}" + text)
    assert refusal(sharded, sharded / name).reason is not Reason.UNAVAILABLE


def test_a_file_or_nonsense_is_no_directory(single):
    for path in (single / "config.json", Path("x" * 5000), Path("nul\0byte")):
        assert refusal(path).reason is Reason.NOT_FOUND


def test_a_missing_shard(sharded):
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    error = refusal(sharded, shard)
    assert error.reason is Reason.UNAVAILABLE
    assert "download" in error.remedy


def test_a_missing_tensor(single):
    for name in (W1, EMBEDDING, "model.norm.weight", "lm_head.weight"):
        with edited_header(single / SINGLE_FILE) as header:
            entry = header.pop(name)
        assert refusal(single, single, name).reason is Reason.NOT_FOUND
        with edited_header(single / SINGLE_FILE) as header:
            header[name] = entry
    read_checkpoint(single)


def test_a_directory_in_place_of_a_file(single):
    (single / SINGLE_FILE).unlink()
    (single / SINGLE_FILE).mkdir()
    refusal(single, single / SINGLE_FILE)
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    refusal(single, single / "config.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe\x00{",
        b'{"a": "\xe9"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content[:12]),
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_FILE])
def test_json_that_is_none(single, name, content):
    (single / name).write_bytes(content)
    refusal(single, single / name)


# What is wrong with config.json


@pytest.mark.parametrize("model_type", [None, "gpt2", "Mixtral", 3, ["mixtral"], {}])
def test_other_architectures_are_unsupported(single, model_type):
    edit_config(single, model_type=model_type, architectures=["OtherForCausalLM"])
    error = refusal(single, single, "OtherForCausalLM")
    assert error.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("architectures", [None, [], [None], "Mixtral", {}, {"a": 1}, 7, [[]]])
def test_architectures_of_any_form(single, architectures):
    """It is only a name to show; `model_type` decides."""
    edit_config(single, architectures=architectures)
    assert_sound(read_checkpoint(single))


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, "8", 2.5, True, [], {}, 10**30], ids=repr)
def test_sizes_that_are_none(single, name, value):
    edit_config(single, **{name: value})
    if (name, value) == ("max_position_embeddings", 10**30):
        return
    error = refusal(single)
    assert str(single) in error.message
    if not isinstance(value, int) or value < 1:
        assert name in error.message


@pytest.mark.parametrize("name", SIZES[:5])
def test_sizes_that_have_no_default(single, name):
    for value in ({name: None}, {}):
        config = json.loads((single / "config.json").read_text())
        config.pop(name)
        (single / "config.json").write_text(json.dumps(config | value))
        refusal(single, single / "config.json", name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"num_attention_heads": 1, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_attention_heads": 64, "head_dim": None}, "head_dim"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": -4}, "sliding_window"),
        ({"sliding_window": "16"}, "sliding_window"),
        ({"rope_parameters": "yarn"}, "rope"),
        ({"rope_parameters": [1]}, "rope"),
        ({"rope_parameters": None, "rope_scaling": 3}, "rope"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": -1}},
            "original_max_position_embeddings",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"eos_token_id": {}}, "eos_token_id"),
        ({"eos_token_id": [None]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": 2.0}, "eos_token_id"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
    ids=str,
)
def test_config_values_that_would_fail_later(single, changes, named):
    (single / "generation_config.json").unlink(missing_ok=True)
    edit_config(single, **changes)
    refusal(single, single / "config.json", named)


# What is wrong with the index


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_a_map(single, weight_map):
    (single / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refusal(single, single / INDEX_FILE)


@pytest.mark.parametrize(
    "name",
    ["../stolen.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", 3, None],
)
def test_an_index_may_name_files_beside_it_only(single, name):
    (single.parent / "stolen.safetensors").write_bytes((single / SINGLE_FILE).read_bytes())
    (single / INDEX_FILE).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    refusal(single)


# What is wrong with a shard


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200])
def test_a_shard_truncated_in_its_header(single, kept):
    file = single / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:kept])
    assert "truncated" in refusal(single, file).message


def test_a_shard_that_is_reserved_and_not_written_yet(single):
    file = single / SINGLE_FILE
    file.write_bytes(bytes(file.stat().st_size))
    found = refusal(single, file)
    assert "truncated" in found.message
    assert found.reason is Reason.UNAVAILABLE, "it is waited for"


def test_a_shard_truncated_in_its_data(single):
    file = single / SINGLE_FILE
    content = file.read_bytes()
    for missing in (1, 100, len(split(file)[1])):
        file.write_bytes(content[:-missing])
        assert "truncated" in refusal(single, file).message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 100 * 2**20 + 1])
def test_a_header_of_absurd_length(single, length):
    file = single / SINGLE_FILE
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refusal(single, file, length)


@pytest.mark.parametrize(
    "header",
    [b"", b"garbage", b"\xff\xfe\xfd", b"{", b"[]", b"7", b'"x"', b"null", b"[" * 100_000],
    ids=lambda header: repr(header[:12]),
)
def test_a_header_that_is_no_table(single, header):
    file = single / SINGLE_FILE
    join(file, header, bytes(100))
    refusal(single, file)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "x",
        3,
        {},
        {"data_offsets": None},
        {"data_offsets": []},
        {"data_offsets": [0]},
        {"data_offsets": [0, 1, 2]},
        {"data_offsets": ["0", "8192"]},
        {"data_offsets": "08"},
        {"data_offsets": {"0": 0, "1": 1}},
        {"data_offsets": [-8192, 0]},
        {"data_offsets": [8192, 0]},
        {"data_offsets": [0.0, 8192.0]},
        {"data_offsets": [0.5, 8192.5]},
        {"data_offsets": [False, 8192]},
        {"data_offsets": [0, 8191]},
        {"data_offsets": [0, 0]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [float("nan"), float("inf")]},
        {"dtype": None},
        {"dtype": []},
        {"dtype": {}},
        {"dtype": 3},
        {"dtype": "F64"},
        {"dtype": "BF16"},
        {"shape": None},
        {"shape": []},
        {"shape": "ab"},
        {"shape": [64]},
        {"shape": [32, 64]},
        {"shape": [64, 32, 1]},
        {"shape": [64.0, 32.0]},
        {"shape": [[64], [32]]},
        {"shape": [-64, -32]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_entries_that_make_no_sense(single, name, entry):
    file = single / SINGLE_FILE
    with edited_header(file) as header:
        header[name] = {**header[name], **entry} if isinstance(entry, dict) and entry else entry
    error = refusal(single)
    assert str(single) in error.message


@pytest.mark.parametrize("name", [W1, "model.layers.0.self_attn.q_proj.weight"])
def test_one_tensor_of_another_dtype_or_shape(single, name):
    file = single / SINGLE_FILE
    for changes in ({"dtype": "F16"}, {"shape": [1, 2]}):
        with edited_header(file) as header:
            kept = dict(header[name])
            header[name].update(changes)
        refusal(single, file, name)
        with edited_header(file) as header:
            header[name] = kept


def test_no_compute_dtype_but_the_three(single):
    with edited_header(single / SINGLE_FILE) as header:
        header[EMBEDDING]["dtype"] = "F8_E4M3"
    assert refusal(single, EMBEDDING, "F8_E4M3").reason is Reason.UNSUPPORTED


# Anything else


def outcome(path: Path) -> None:
    """Reads; what is accepted must be sound, and nothing but MoeServerError may be raised."""
    try:
        checkpoint = read_checkpoint(path)
    except MoeServerError as error:
        assert error.message
    else:
        assert_sound(checkpoint)


@pytest.fixture(scope="module")
def fuzzed(written) -> Iterator[Callable[[str, bytes], None]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(written, Path(folder) / "model"))

        def read_with(name: str, content: bytes) -> None:
            original = (path / name).read_bytes()
            (path / name).write_bytes(content)
            try:
                outcome(path)
            finally:
                (path / name).write_bytes(original)

        yield read_with


@given(
    flips=st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 2**32),
)
@settings(max_examples=150)
def test_damaged_shards_never_surprise(written, fuzzed, flips, cut):
    content = bytearray((written / SINGLE_FILE).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position, value in flips:
        content[position % header_end] = value
    fuzzed(SINGLE_FILE, bytes(content[: None if cut is None else cut % len(content)]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
CONFIG_KEYS = (
    *SIZES,
    "architectures",
    "model_type",
    "eos_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "original_max_position_embeddings",
    "sliding_window",
)


@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), anything, min_size=1, max_size=2))
@settings(max_examples=200)
def test_configs_of_any_values_never_surprise(written, fuzzed, changes):
    config = json.loads((written / "config.json").read_text())
    fuzzed("config.json", json.dumps(config | changes).encode())


@given(
    rope_type=st.sampled_from(["dynamic", "longrope", "yarn"]) | anything,
    original=anything,
)
@settings(max_examples=50)
def test_rope_of_any_values_never_surprises(written, fuzzed, rope_type, original):
    config = json.loads((written / "config.json").read_text())
    rope = {"rope_type": rope_type, "original_max_position_embeddings": original}
    fuzzed("config.json", json.dumps(config | {"rope_parameters": rope}).encode())


@given(changes=st.dictionaries(st.sampled_from(["data_offsets", "shape", "dtype"]), anything))
@settings(max_examples=100)
def test_header_entries_of_any_values_never_surprise(written, fuzzed, changes):
    header, data = split(written / SINGLE_FILE)
    name = random.Random(str(changes)).choice(sorted(header))
    header[name] = {**header[name], **changes}
    text = json.dumps(header).encode()
    fuzzed(SINGLE_FILE, len(text).to_bytes(8, "little") + text + data)


def test_a_config_that_describes_a_part_of_the_checkpoint_is_refused(tmp_path):
    path = Tiny(layers=3).write(tmp_path)
    edit_config(path, num_hidden_layers=2)
    with pytest.raises(MoeServerError, match=r"tensors are not part of the model .*layers\.2\."):
        read_checkpoint(path)


def test_tensors_that_are_not_needed_may_be_there(tmp_path):
    path = Tiny().write(tmp_path)
    edit_config(path, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_checkpoint(path).dense
