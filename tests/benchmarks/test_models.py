"""The models' folder: what goes when room is short, and what is told when there is none."""

import sys
from pathlib import Path

import pytest

from benchmarks.models import MODELS, ModelFolder, ModelUnavailableError


def filled(path: Path, **sizes: int) -> ModelFolder:
    folder = ModelFolder(path, 100, lambda: Path(sys.executable))
    for name, size in sizes.items():
        (path / name).write_bytes(b"x" * size)
    return folder


def test_the_largest_goes_first_but_nothing_that_is_needed(tmp_path: Path) -> None:
    folder = filled(tmp_path, needed=50, large=30, small=10)
    folder.make_room(30, {"needed"})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["needed", "small"]
    folder.make_room(50, {"needed"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["needed"]


def test_no_room_is_told(tmp_path: Path) -> None:
    folder = filled(tmp_path, needed=50, small=10)
    with pytest.raises(ModelUnavailableError, match="are needed"):
        folder.make_room(60, {"needed"})
    assert (tmp_path / "needed").exists()


def test_sizes_are_known_before_anything_is_made() -> None:
    assert MODELS["bf16-4"].size_bytes == pytest.approx(12.13e9, rel=0.01)
    assert MODELS["q4_0-4.gguf"].size_bytes == pytest.approx(3.464e9, rel=0.02)
    folder_limit = 45e9
    four_layers = ("bf16-4", "bf16-4.gguf", "q4_0-4.gguf", "int4-4")
    assert sum(MODELS[name].size_bytes for name in four_layers) < folder_limit
    assert all(MODELS[name].size_bytes < folder_limit for name in ("int4-32", "q4_0-32.gguf"))


def test_a_model_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, 10**14, lambda: Path(sys.executable))
    (tmp_path / "bf16-small").mkdir()
    with pytest.raises(
        ModelUnavailableError, match=r"(?s)bf16-small\.gguf could not be made: .*Error"
    ):
        folder.require("bf16-small.gguf")
