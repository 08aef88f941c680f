"""Reads byte ranges of files into memory, on threads, past the page cache.

O_DIRECT, so that weights are never held twice; a file system without it is read buffered and its
pages are dropped again. A range whose file offset and target are both page-aligned is read straight
into place; any other goes through a window of whole pages and is copied out of it. Ranges are cut
into chunks that all threads share, so one large read uses the whole queue depth and a cancelled one
stops within a chunk.

Knows files and addresses, no experts. `checkpoint` says which ranges make a record; `cache` waits.
"""

import ctypes
import errno
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.layout import PAGE_BYTES, Segment
from moe_server.offload.pages import map_pages


class ReadTicket:
    """One read under way. Its target belongs to the reader until `wait` returns or raises."""

    def __init__(self, num_chunks: int) -> None:
        self._remaining = num_chunks
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: MoeServerError | None = None
        self._cancelled = False
        if num_chunks == 0:
            self._finished.set()

    @property
    def done(self) -> bool:
        """True once no thread will touch the target any more."""
        return self._finished.is_set()

    def cancel(self) -> None:
        """Skips the chunks that have not begun; follow with `wait` before the target is reused."""
        with self._lock:
            # A read that has ended keeps its result.
            self._cancelled |= self._remaining > 0

    def wait(self) -> None:
        """Blocks until the read ended.

        Raises:
            MoeServerError: The file could not be read, or the read was cancelled on its way; the
                target's content is undefined.
        """
        self._finished.wait()
        if self._error is not None:
            raise self._error
        if self._cancelled:
            raise MoeServerError("The read was cancelled.", reason=Reason.UNAVAILABLE)

    @property
    def wanted(self) -> bool:
        """False once the rest of it need not be read."""
        return not self._cancelled and self._error is None

    def chunk_done(self, error: MoeServerError | None) -> None:
        """Called by the reader's threads, once for every chunk."""
        with self._lock:
            self._error = self._error or error
            self._remaining -= 1
            if self._remaining == 0:
                self._finished.set()


@dataclass(frozen=True, slots=True)
class _Chunk:
    ticket: ReadTicket
    file: Path
    file_offset: int
    nbytes: int
    address: int


class Reader:
    """A queue of reads and the threads that serve it, first come first served.

    Args:
        num_threads: Reads in flight.
        chunk_bytes: Size of one read, a multiple of the page size.
    """

    def __init__(self, num_threads: int, chunk_bytes: int) -> None:
        assert chunk_bytes % PAGE_BYTES == 0
        self._chunk_bytes = chunk_bytes
        self._files = _OpenFiles()
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        # One page more on either side: an unaligned range reaches into its neighbours' pages.
        windows = [map_pages(chunk_bytes + 2 * PAGE_BYTES) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=[window], name=f"reader-{index}", daemon=True)
            for index, window in enumerate(windows)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, segments: Sequence[Segment], address: int) -> ReadTicket:
        """Starts reading `segments` to `address`; the memory must stay valid until the end."""
        chunks = [
            (segment, start, min(self._chunk_bytes, segment.nbytes - start))
            for segment in segments
            for start in range(0, segment.nbytes, self._chunk_bytes)
        ]
        ticket = ReadTicket(len(chunks))
        for segment, start, nbytes in chunks:
            target = address + segment.record_offset + start
            self._queue.put(
                _Chunk(ticket, segment.file, segment.file_offset + start, nbytes, target)
            )
        return ticket

    def close(self) -> None:
        """Ends the threads after the reads that are queued."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._files.close()

    def _serve(self, window: mmap.mmap) -> None:
        while (chunk := self._queue.get()) is not None:
            error = None
            if chunk.ticket.wanted:
                try:
                    self._read(chunk, window)
                except OSError as failure:
                    error = _read_error(chunk.file, failure.strerror or str(failure))
                except Exception as failure:  # noqa: BLE001  a dead thread would leave waiters
                    error = _read_error(chunk.file, str(failure))
            chunk.ticket.chunk_done(error)

    def _read(self, chunk: _Chunk, window: mmap.mmap) -> None:
        file = self._files.get(chunk.file)
        aligned = (chunk.file_offset | chunk.nbytes | chunk.address) % PAGE_BYTES == 0
        if aligned or not file.direct:
            target = (ctypes.c_char * chunk.nbytes).from_address(chunk.address)
            _read_fully(file, memoryview(target), chunk.file_offset, chunk.nbytes)
        else:
            lead = chunk.file_offset % PAGE_BYTES
            first_page = chunk.file_offset - lead
            length = -(-(lead + chunk.nbytes) // PAGE_BYTES) * PAGE_BYTES
            view = memoryview(window)[:length]
            _read_fully(file, view, first_page, lead + chunk.nbytes)
            source = ctypes.addressof(ctypes.c_char.from_buffer(window))
            ctypes.memmove(chunk.address, source + lead, chunk.nbytes)  # releases the GIL
        if not file.direct:
            os.posix_fadvise(
                file.descriptor, chunk.file_offset, chunk.nbytes, os.POSIX_FADV_DONTNEED
            )


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    direct: bool


def _read_fully(file: _OpenFile, target: memoryview, offset: int, needed: int) -> None:
    """Fills at least `needed` bytes of `target`; a read may come back short at any point."""
    # O_DIRECT goes on at a page boundary; what came of a partial page is read again.
    step = PAGE_BYTES if file.direct else 1
    done = 0
    while (count := os.preadv(file.descriptor, [target[done:]], offset + done)) < needed - done:
        come_to = (done + count) // step * step
        if come_to <= done:
            size = os.fstat(file.descriptor).st_size
            raise EOFError(f"it ends at byte {size}, expected {offset + needed}")
        done = come_to


class _OpenFiles:
    """Descriptors by path, kept open: a file that is deleted under the server can still be read."""

    def __init__(self) -> None:
        self._open: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()

    def get(self, path: Path) -> _OpenFile:
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path)
            return self._open[path]

    def close(self) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()


def _open(path: Path) -> _OpenFile:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # No read-ahead: it would bring pages after they were dropped, for good.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return _OpenFile(descriptor, direct=False)
    return _OpenFile(descriptor, direct=True)


def _read_error(file: Path, what: str) -> MoeServerError:
    return MoeServerError(
        f"Reading {file} failed: {what}.",
        "Check the disk and the file, then try again.",
        reason=Reason.UNAVAILABLE,
    )
