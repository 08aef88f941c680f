"""Files that weights are read from: open descriptors, and reads that are complete or an error.

O_DIRECT where the file system has it, so that weights are never held twice; elsewhere reads are
buffered and their pages dropped again. Knows no experts and no threads; `reader` calls it.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_server.offload.layout import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file, and whether its reads bypass the page cache."""

    descriptor: int
    direct: bool
    size: int
    """When it was opened."""

    def read_into(
        self,
        address: int,
        offset: int,
        nbytes: int,
        window: mmap.mmap,
        touch: Callable[[int, int], None],
    ) -> None:
        """Reads `nbytes` from `offset` on to `address`.

        Args:
            address: Where they go.
            offset: Where they begin in the file.
            nbytes: How many.
            window: Scratch memory of whole pages, two more than `nbytes` take: a range whose file
                offset or target is not page-aligned is read as whole pages and copied out of it.
            touch: Has the kernel provide the target's memory; given its address and size.

        Raises:
            OSError: The read failed.
            EOFError: The file ends before.
        """
        touch(address, nbytes)
        aligned = (offset | nbytes | address) % PAGE_BYTES == 0
        if aligned or not self.direct:
            target = (ctypes.c_char * nbytes).from_address(address)
            self._fill(memoryview(target), offset, nbytes)
        else:
            lead = offset % PAGE_BYTES
            length = -(-(lead + nbytes) // PAGE_BYTES) * PAGE_BYTES
            self._fill(memoryview(window)[:length], offset - lead, lead + nbytes)
            source = ctypes.addressof(ctypes.c_char.from_buffer(window))
            ctypes.memmove(address, source + lead, nbytes)  # releases the GIL
        if not self.direct:
            os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _fill(self, target: memoryview, offset: int, needed: int) -> None:
        """Fills at least `needed` bytes of `target`; a read may come back short at any point."""
        # O_DIRECT goes on at a page boundary; what came of a partial page is read again.
        step = PAGE_BYTES if self.direct else 1
        done = 0
        while (count := os.preadv(self.descriptor, [target[done:]], offset + done)) < needed - done:
            come_to = (done + count) // step * step
            if come_to <= done:
                size = os.fstat(self.descriptor).st_size
                raise EOFError(f"it ends at byte {size}, expected {offset + needed}")
            done = come_to


class OpenFiles:
    """Descriptors by path, kept open: a file that is deleted under the server can still be read."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenFile] = {}
        self._replaced: list[OpenFile] = []
        """Closed at the end: reads may be under way."""
        self._lock = threading.Lock()

    def get(self, path: Path) -> OpenFile:
        """Opens `path`, once.

        Raises:
            OSError: It cannot be opened.
        """
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path)
            return self._open[path]

    def renew(self, path: Path, failed: OpenFile) -> bool:
        """After a failed read: turns to the file that has taken the place of the one that failed.

        Args:
            path: Its path.
            failed: What `get` returned for it.

        Returns:
            True if there is one, of the size that the other had at first. (One of another size is
            not the same weights.)
        """
        with self._lock, contextlib.suppress(OSError):
            if self._open[path] is not failed:
                return True  # another read has seen to it
            found = path.stat()
            is_same = os.path.samestat(os.fstat(failed.descriptor), found)
            if not is_same and found.st_size == failed.size:
                self._open[path] = _open(path)
                self._replaced.append(failed)
                return True
        return False

    @property
    def buffered(self) -> list[Path]:
        """Open files whose file system has no O_DIRECT."""
        with self._lock:
            return [path for path, file in self._open.items() if not file.direct]

    def close(self) -> None:
        """Closes all."""
        for file in (*self._open.values(), *self._replaced):
            os.close(file.descriptor)
        self._open.clear()
        self._replaced.clear()


def _open(path: Path) -> OpenFile:
    descriptor = _open_direct(path)
    is_direct = descriptor is not None
    if descriptor is None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # No read-ahead: it would bring pages after they were dropped, for good.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return OpenFile(descriptor, direct=is_direct, size=os.fstat(descriptor).st_size)


def _open_direct(path: Path) -> int | None:
    """A descriptor that bypasses the page cache; None where the file system has no such reads.

    Some refuse to open the file, others the first read, or any that is not aligned to more than a
    page.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            os.readv(descriptor, [page])
    except OSError as error:
        if error.errno == errno.EINVAL:
            os.close(descriptor)
            return None
        # Another failure of the first page is for whoever reads it.
    return descriptor
