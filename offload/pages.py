"""Anonymous memory on huge pages, where the kernel has them.

O_DIRECT reads fill huge pages two to three times as fast as small ones; a kernel without them (or a
sandbox that has no `madvise` for them) serves small ones. Knows nothing of what lies in it.
"""

import contextlib
import mmap


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
