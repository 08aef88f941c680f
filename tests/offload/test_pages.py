"""Memory that reads go to."""

import ctypes
import mmap

from moe_server.offload.pages import map_pages, touch

MIB = 2**20


def test_touching_provides_memory_and_leaves_the_neighbours_bytes_alone():
    memory = map_pages(8 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = 3 * MIB + 4096
    memory[start - 1] = memory[start + MIB] = 7
    touch(address + start, MIB)
    assert memory[start - 1] == memory[start + MIB] == 7


def test_touching_reaches_every_huge_page_of_a_range():
    memory = map_pages(16 * MIB)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[:] = b"\1" * len(memory)
    touch(base + mmap.PAGESIZE, 16 * MIB - mmap.PAGESIZE)
    written = {(base + at) // (2 * MIB) for at in range(0, 16 * MIB, 4096) if memory[at] == 0}
    pages = range((base + mmap.PAGESIZE) // (2 * MIB), (base + 16 * MIB - 1) // (2 * MIB) + 1)
    assert written == set(pages)
