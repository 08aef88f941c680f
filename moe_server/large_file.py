"""Writes a large file past the page cache.

It passes through a small memory limit and pushes nothing out of the cache. Knows pages, no formats;
`synth` and `pack` write with it, from any number of threads.
"""

import errno
import mmap
import os
from pathlib import Path

PAGE_BYTES = 4096
"""What O_DIRECT asks of memory, offsets and lengths to be multiples of."""


class LargeFile:
    """A file that is written in parts.

    Args:
        path: Where it is, or is to be.
        keep: Leave what is in it.

    Raises:
        OSError: It cannot be opened; so for the methods.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        flags = os.O_CREAT | os.O_WRONLY | (0 if keep else os.O_TRUNC)
        self._buffered = os.open(path, flags, 0o666)
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self._buffered)
                raise
            self._direct = self._buffered  # tmpfs and some others have no O_DIRECT

    def write(self, memory: mmap.mmap, size_bytes: int, offset: int) -> None:
        """Writes the first `size_bytes` of `memory`; whole pages go past the page cache."""
        whole_pages = (offset | size_bytes) % PAGE_BYTES == 0
        file = self._direct if whole_pages else self._buffered
        with memoryview(memory) as view:
            position = 0
            while position < size_bytes:
                position += os.pwrite(file, view[position:size_bytes], offset + position)
        if file == self._buffered:
            # Start writing the pages out now, so that they can be dropped soon.
            os.posix_fadvise(file, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Waits until everything is on the disk."""
        os.fsync(self._buffered)
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._direct != self._buffered:
            os.close(self._direct)
        os.close(self._buffered)
