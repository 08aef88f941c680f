"""A model that keeps no weights answers as transformers' own does."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_server.checkpoint import read_checkpoint
from moe_server.errors import MoeServerError
from moe_server.kernels import native
from moe_server.layerwise import LayerwiseModel
from moe_server.offload.layout import ExpertId
from tests.stores import dense_values, matrices, pack_as
from tests.tiny import Tiny

WINDOWS = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(0))


def ignore(_size_bytes: int) -> None:
    """No progress is wanted."""


def layerwise(path: Path, read: Callable[[int], None] = ignore) -> torch.Tensor:
    with closing(LayerwiseModel(read_checkpoint(path), read)) as model:
        return model.logits(WINDOWS)


def transformers_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", experts_implementation="eager", attn_implementation="sdpa"
    )
    with torch.inference_mode():
        return model(WINDOWS).logits


@pytest.mark.parametrize(
    "tiny",
    [Tiny(), Tiny(tied=True), Tiny(sliding_window=6, kv_heads=4, max_shard="50KB")],
    ids=["plain", "tied", "sliding window"],
)
def test_logits_are_those_of_transformers(tiny, tmp_path):
    tiny.write(tmp_path / "m")
    torch.testing.assert_close(layerwise(tmp_path / "m"), transformers_logits(tmp_path / "m"))


def test_a_packed_store_in_its_own_dtype_changes_no_bit(tmp_path):
    Tiny(dtype="bfloat16").write(tmp_path / "m")
    pack_as(tmp_path / "m", tmp_path / "out", "bf16")
    assert torch.equal(layerwise(tmp_path / "out"), layerwise(tmp_path / "m"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format_name", ["int8", "int4"])
def test_a_quantised_store_is_the_model_of_its_weights(tmp_path, monkeypatch, format_name, tied):
    """Computed by torch, as kernels round activations, too, and near-ties are routed elsewhere."""
    monkeypatch.setattr(native, "is_available", lambda: False)
    Tiny(tied=tied).write(tmp_path / "m")
    pack_as(tmp_path / "m", tmp_path / "out", format_name, dense_int8=True)
    store = read_checkpoint(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", experts_implementation="eager")
    with torch.inference_mode():
        for name in store.dense:
            model.get_parameter(name).copy_(dense_values(store, name))
        for expert in store.experts:
            w1, w3, w2 = matrices(store, expert)
            experts = model.model.layers[expert.layer].mlp.experts
            experts.gate_up_proj[expert.expert].copy_(torch.cat([w1, w3]))
            experts.down_proj[expert.expert].copy_(w2)
        expected = model(WINDOWS).logits
    torch.testing.assert_close(layerwise(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, layerwise(tmp_path / "m"), rtol=1e-2)


def test_it_tells_what_it_read(tmp_path):
    Tiny().write(tmp_path / "m")
    checkpoint = read_checkpoint(tmp_path / "m")
    sizes: list[int] = []
    layerwise(tmp_path / "m", sizes.append)
    experts = len(checkpoint.experts) * checkpoint.record_layout.weight_bytes
    assert sum(sizes) == checkpoint.dense_bytes + experts


def test_a_damaged_store_is_not_measured(tmp_path):
    Tiny().write(tmp_path / "m")
    pack_as(tmp_path / "m", tmp_path / "out", "int8")
    [segment] = read_checkpoint(tmp_path / "out").record_segments(ExpertId(1, 3))
    with segment.file.open("r+b") as file:
        file.seek(segment.file_offset + 100)
        byte = file.read(1)[0]
        file.seek(segment.file_offset + 100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(MoeServerError, match=segment.file.name):
        layerwise(tmp_path / "out")
