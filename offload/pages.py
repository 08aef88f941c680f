"""Anonymous memory on huge pages, where the kernel has them.

O_DIRECT reads fill huge pages two to three times as fast as small ones; a kernel without them (or a
sandbox that has no `madvise` for them) serves small ones. Knows nothing of what lies in it.
"""

import contextlib
import ctypes
import mmap

from moe_server.kernels.formats import round_up

HUGE_BYTES = 2**21
"""Of a huge page on x86 and, with 4 KiB pages, on ARM."""


def map_pages(size: int) -> mmap.mmap:
    """Maps `size` bytes of zeros, page-aligned, touched on first use.

    Raises:
        OSError: The kernel refused the mapping.
    """
    # Private, as huge pages of shared mappings are off by default.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    # A process that forks while the disk writes here could end up with stale pages.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_DONTFORK)
    return mapping


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def touch(address: int, nbytes: int) -> None:
    """Has the kernel provide memory that is about to be overwritten; destroys what is in it.

    A system call that meets missing pages holds the lock of the whole address space while it clears
    them, and every `mmap` of another thread waits for it: an import, for example. A fault of the
    program itself locks one mapping only.
    """
    first_page = round_up(address, HUGE_BYTES)
    for start in (address, *range(first_page, address + nbytes, HUGE_BYTES)):
        ctypes.memset(start, 0, 1)  # releases the GIL
