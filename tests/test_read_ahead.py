"""What an import will read is in the page cache before it begins."""

import os
import sys

import pytest

from moe_server import read_ahead as module
from moe_server.read_ahead import read_ahead


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three compiled modules that nothing has imported, on a real disk."""
    folder = tmp_path / "somelibrary"
    for name in ("__init__", "deep/__init__", "deep/leaf"):
        source = folder / f"{name}.py"
        compiled = (
            source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        )
        compiled.parent.mkdir(parents=True, exist_ok=True)
        source.touch()
        compiled.write_bytes(b"x" * 10_000)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.fixture
def read(monkeypatch):
    read = []
    real = module.Path.read_bytes

    def read_bytes(path):
        read.append(path)
        return real(path)

    monkeypatch.setattr(module.Path, "read_bytes", read_bytes)
    return read


def forget(folder) -> None:
    """Drops a folder's files from the page cache."""
    for file in folder.rglob("*.pyc"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def test_every_compiled_module_is_read_once(package, read):
    compiled = sorted(package.rglob("*.pyc"))
    forget(package)
    if module._is_cached(compiled[-1]):  # asking has it read
        pytest.skip("this file system keeps what it was asked to forget")
    read_ahead("somelibrary")
    assert sorted(read) == compiled
    read_ahead("somelibrary")
    assert len(read) == len(compiled), "read although it was there"
    assert "somelibrary" not in sys.modules


def test_what_cannot_be_read_stops_nothing(package, monkeypatch):
    monkeypatch.setattr(module, "_is_cached", lambda _file: False)
    next(package.rglob("leaf*.pyc")).unlink()
    (package / "__pycache__" / "gone.pyc").symlink_to("nowhere")
    read_ahead("nosuchlibrary", "somelibrary")
