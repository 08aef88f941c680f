"""Shared memory: seen by whoever maps the file, on huge pages where the kernel has them."""

import ctypes
import os
import re
from pathlib import Path

import pytest

from moe_server.offload.pages import HUGE_BYTES
from moe_server.offload.shared_pages import SharedPages, is_as_fast_as_private


@pytest.fixture
def descriptor():
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 8 * HUGE_BYTES)
    yield descriptor
    os.close(descriptor)


def content(pages: SharedPages, nbytes: int):
    return (ctypes.c_char * nbytes).from_address(pages.address)


def huge_bytes(address: int) -> int:
    """What of the mapping at `address` lies on huge pages."""
    maps = Path("/proc/self/smaps").read_text(encoding="ascii")
    [found] = re.findall(
        rf"^{address:x}-.*?^ShmemPmdMapped: +(\d+) kB", maps, re.DOTALL | re.MULTILINE
    )
    return int(found) * 1024


def test_two_mappings_of_a_range_see_the_same(descriptor):
    one = SharedPages(descriptor, 2 * HUGE_BYTES, 2 * HUGE_BYTES)
    content(one, 5).value = b"here"
    other = SharedPages(descriptor, 2 * HUGE_BYTES, 2 * HUGE_BYTES)
    assert one.address != other.address
    assert content(other, 5).value == b"here"
    assert os.pread(descriptor, 4, 2 * HUGE_BYTES) == b"here"


def test_touching_provides_huge_pages_and_leaves_all_bytes_alone(descriptor):
    pages = SharedPages(descriptor, 0, 8 * HUGE_BYTES)
    memory = (ctypes.c_ubyte * (8 * HUGE_BYTES)).from_address(pages.address)
    places = (0, HUGE_BYTES, 3 * HUGE_BYTES + 4095, 3 * HUGE_BYTES + 4096, 5 * HUGE_BYTES)
    for place in places:
        memory[place] = 7
    pages.touch(pages.address + HUGE_BYTES + 4096, 3 * HUGE_BYTES)
    assert all(memory[place] == 7 for place in places)
    if is_as_fast_as_private():
        assert huge_bytes(pages.address) == 4 * HUGE_BYTES
    pages.touch(pages.address, 8 * HUGE_BYTES)
    assert all(memory[place] == 7 for place in places)
    assert sum(memory) == 7 * len(places)


def test_a_kernel_without_huge_pages_for_shared_memory(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("moe_server.offload.shared_pages._advise", refuse)
    monkeypatch.setattr("moe_server.offload.shared_pages._SYSTEM", tmp_path)
    for shared, private, expected in (
        ("always advise [never]", "always [madvise] never", False),
        ("always advise [never]", "always madvise [never]", True),
        ("always [advise] never", "always [madvise] never", True),
    ):
        (tmp_path / "shmem_enabled").write_text(shared)
        (tmp_path / "enabled").write_text(private)
        assert is_as_fast_as_private() is expected
