"""Writing large files past the page cache.

They pass through a small memory limit and push nothing out of the cache. Knows pages, no formats;
`synth` and `pack` write with it.
"""

import errno
import mmap
import os
from pathlib import Path

ALIGNMENT_BYTES = 4096
"""Of the memory, the offset and the length of every write: what O_DIRECT asks for."""


def open_direct(path: Path, *, truncate: bool = True) -> int:
    """Opens for writing, with O_DIRECT where the file system has it; returns the descriptor."""
    flags = os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if truncate else 0)
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # tmpfs and some others have no O_DIRECT


def write_aligned(file: int, memory: mmap.mmap, size_bytes: int, offset: int) -> None:
    """Writes the first `size_bytes` of `memory`, and what follows them up to the alignment."""
    stop = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    with memoryview(memory) as view:
        position = 0
        while position < stop:
            position += os.pwrite(file, view[position:stop], offset + position)
    # Without O_DIRECT: start writing the pages out now, so that they can be dropped soon.
    os.posix_fadvise(file, offset, stop, os.POSIX_FADV_DONTNEED)
