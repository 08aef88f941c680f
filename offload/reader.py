"""Reads records into memory, on threads, past the page cache.

A read is cut into blocks that all threads share: one large record uses the whole queue depth, its
bytes can be used from the front while the rest is on its way, and a cancelled one stops within a
block. Demand reads go before prefetches, those before the preload of a start, and what is read in
the background after everything; a read that turns out to be wanted is promoted.

Knows files and addresses, no experts. `checkpoint` says which ranges make a record; `cache` waits.
"""

import contextlib
import ctypes
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.checksum import ChecksumBook, RowChecksums
from moe_server.offload.files import OpenFile, OpenFiles
from moe_server.offload.layout import PAGE_BYTES, Segment
from moe_server.offload.pages import map_pages, touch

_ATTEMPTS = 3
"""A block that fails is read again: the error, or the flipped bit, may have been on the way."""
_RETRY_S = 0.01
_PREFETCH_DEPTH = 2
"""Blocks of prefetches in flight at once: all that a demand read can find before it."""


Touch: TypeAlias = Callable[[int, int], None]
"""Has the kernel provide memory; given its address and size."""


class Priority(IntEnum):
    """Who goes first."""

    DEMAND = 0
    """Somebody waits for it."""
    PREFETCH = 1
    """Somebody may want it."""
    PRELOAD = 2
    """Nobody is served yet, or somebody is who needs only some of it: it may use the whole disk."""
    BACKGROUND = 3
    """Nobody waits for it: one block at a time, and while nothing else is being read."""


@dataclass(frozen=True, slots=True)
class _Block:
    segment: Segment
    start: int
    """Of the segment."""
    nbytes: int

    @property
    def record_end(self) -> int:
        return self.segment.record_offset + self.start + self.nbytes


class ReadTicket:
    """One read under way. Its target belongs to the reader until it is `done`."""

    def __init__(
        self,
        reader: "Reader",
        blocks: Sequence[_Block],
        address: int,
        priority: Priority,
        book: ChecksumBook | RowChecksums,
    ) -> None:
        self._reader = reader
        self._ends = [block.record_end for block in blocks]
        self._sizes = [block.nbytes for block in blocks]
        self._arrived = [False] * len(blocks)
        self._front = 0
        """Blocks that have arrived without a gap, from the first one on."""
        self.error: MoeServerError | None = None
        """Why not everything will come, once it is known; None after a cancellation."""
        # What follows is the reader's, under its lock.
        self.changed = threading.Condition(reader.lock)
        self.address = address
        self.book = book
        self.owner: object = None
        self.touch: Touch = touch
        self.priority = priority
        self.pending = deque(enumerate(blocks))
        self.in_flight = 0

    @property
    def done(self) -> bool:
        """True once no thread will touch the target any more."""
        return not self.pending and not self.in_flight

    @property
    def complete(self) -> bool:
        """True once everything has arrived."""
        return self._front == len(self._ends)

    @property
    def arrived_bytes(self) -> int:
        """The record's first bytes that are there, up to the first gap."""
        return self._ends[self._front - 1] if self._front else 0

    @property
    def read_bytes(self) -> int:
        """Bytes that were read, wherever in the record they lie."""
        return sum(
            size for size, arrived in zip(self._sizes, self._arrived, strict=True) if arrived
        )

    @property
    def queued_bytes(self) -> int:
        """Bytes that no thread has begun to read."""
        return len(self.pending) * self._sizes[0] if self.pending else 0

    def cancel(self) -> None:
        """Drops what is not being read yet; `wait` before the target is used for anything else."""
        self._reader.drop(self)

    def promote(self) -> None:
        """Makes it a demand read."""
        self._reader.promote(self)

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the read ended, or the time is over.

        Raises:
            MoeServerError: The file could not be read, or the read was cancelled on its way; the
                target's content is undefined.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: self.done, timeout_s):
                return
        self._raise_if_failed()

    def wait_beyond(self, nbytes: int, timeout_s: float) -> int:
        """Blocks until more than the record's first `nbytes` are there, or the time is over.

        Returns:
            How many of the record's first bytes are there.

        Raises:
            MoeServerError: As for `wait`, as soon as it is known that they never will be.
        """
        with self.changed:
            if self.arrived_bytes <= nbytes and not self.done and self.error is None:
                self.changed.wait(timeout_s)
        if self.error is not None or self.done:
            self._raise_if_failed()
        return self.arrived_bytes

    def block_ended(self, index: int, error: MoeServerError | None) -> None:
        """Called by the reader's threads, under the lock."""
        if error is None:
            self._arrived[index] = True
            while self._front < len(self._ends) and self._arrived[self._front]:
                self._front += 1
        else:
            self.error = self.error or error
            self.pending.clear()
        self.in_flight -= 1  # last, for those who ask without the lock whether the read is done
        self.changed.notify_all()

    def _raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error
        if not self.complete:
            raise MoeServerError("The read was cancelled.", reason=Reason.UNAVAILABLE)


@dataclass(slots=True)
class ReadCounters:
    """What the disk did since the start."""

    bytes: int = 0
    busy_s: float = 0.0
    """Seconds in which at least one block was in flight: bytes / busy_s is the disk's speed."""
    retries: int = 0
    """Blocks that were read again after an error."""
    mismatches: int = 0
    """Blocks whose checksum was wrong."""
    failures: int = 0
    """Blocks that could not be read, however often it was tried."""


class Reader:
    """Queues of reads and the threads that serve them.

    Args:
        num_threads: Most blocks in flight.
        block_bytes: Largest block, a multiple of the page size and of the pieces of `book`.
        book: Checksums to hold blocks to.
    """

    def __init__(
        self, num_threads: int, block_bytes: int, book: ChecksumBook | None = None
    ) -> None:
        self.counters = ReadCounters()
        self.lock = threading.Lock()
        self.depth = num_threads
        """Blocks in flight at most; may be lowered and raised again up to the number of threads."""
        self.block_bytes = block_bytes
        """Size of a block, for reads that are submitted from now on; at most the constructor's."""
        self.book = book or ChecksumBook()
        assert block_bytes % PAGE_BYTES == 0
        assert self.book.is_empty or block_bytes % self.book.piece_bytes == 0
        self._files = OpenFiles()
        self._queues: dict[Priority, deque[ReadTicket]] = {one: deque() for one in Priority}
        self._work = threading.Condition(self.lock)
        self._in_flight = dict.fromkeys(Priority, 0)
        self._busy_since = 0.0
        self._closing = False
        # One page more on either side: an unaligned range reaches into its neighbours' pages.
        windows = [map_pages(block_bytes + 2 * PAGE_BYTES) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=[window], name=f"reader-{index}", daemon=True)
            for index, window in enumerate(windows)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        segments: Sequence[Segment],
        address: int,
        priority: Priority = Priority.DEMAND,
        owner: object = None,
        book: RowChecksums | None = None,
        touch: Touch = touch,
    ) -> ReadTicket:
        """Starts reading.

        Args:
            segments: What to read.
            address: Where the record begins in memory.
            priority: Who goes first.
            owner: Owns that memory; kept alive until the read has ended.
            book: What segments that are no whole pieces are held to, in place of the reader's book.
            touch: Has the kernel provide a part of that memory; given its address and size.
        """
        blocks = [
            _Block(segment, start, min(self.block_bytes, segment.nbytes - start))
            for segment in sorted(segments, key=lambda segment: segment.record_offset)
            for start in range(0, segment.nbytes, self.block_bytes)
        ]
        ticket = ReadTicket(self, blocks, address, priority, book or self.book)
        ticket.owner, ticket.touch = owner, touch
        if blocks:
            with self.lock:
                self._queues[priority].append(ticket)
                self._work.notify(len(blocks))
        return ticket

    def promote(self, ticket: ReadTicket) -> None:
        """Moves a ticket to the end of the demand queue, if it is not there."""
        with self.lock:
            if ticket.priority is Priority.DEMAND:
                return
            with contextlib.suppress(ValueError):  # it is no longer queued
                self._queues[ticket.priority].remove(ticket)
                self._queues[Priority.DEMAND].append(ticket)
            # Its blocks in flight are demand now, too: they hold no prefetch back.
            self._in_flight[ticket.priority] -= ticket.in_flight
            self._in_flight[Priority.DEMAND] += ticket.in_flight
            ticket.priority = Priority.DEMAND
            self._work.notify_all()

    def drop(self, ticket: ReadTicket) -> None:
        """Forgets the blocks of a ticket that have not begun."""
        with self.lock:
            ticket.pending.clear()
            with contextlib.suppress(ValueError):
                self._queues[ticket.priority].remove(ticket)
            ticket.changed.notify_all()

    def speed(self) -> tuple[int, float]:
        """Bytes read so far, and the seconds in which at least one block was in flight."""
        with self.lock:
            under_way = (
                time.perf_counter() - self._busy_since if any(self._in_flight.values()) else 0.0
            )
            return self.counters.bytes, self.counters.busy_s + under_way

    @property
    def buffered_files(self) -> int:
        """Open files whose file system has no O_DIRECT: reading them costs a copy."""
        return len(self._files.buffered)

    def close(self) -> None:
        """Ends the threads after the reads that are queued."""
        with self.lock:
            self._closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._files.close()

    def _serve(self, window: mmap.mmap) -> None:
        while self._serve_block(window):
            pass

    def _serve_block(self, window: mmap.mmap) -> bool:
        """Waits for a block and reads it; False: there will be none any more.

        A call of its own, so that no idle thread holds a ticket, and with it the target's owner.
        """
        with self._work:
            while (taken := self._take()) is None:
                if self._closing and not any(self._queues.values()):
                    return False
                self._work.wait()
        ticket, index, block = taken
        error = self._attempt(ticket, block, window)
        with self._work:
            self._end(ticket, index, block, error)
        return True

    def _take(self) -> tuple[ReadTicket, int, _Block] | None:
        """The next block; None while there is none or enough are in flight. Under the lock."""
        in_flight = sum(self._in_flight.values())
        if in_flight >= self.depth:
            return None
        for priority, queue in self._queues.items():
            most = _PREFETCH_DEPTH if priority is Priority.PREFETCH else self.depth
            if not queue or self._in_flight[priority] >= most:
                continue
            if priority is Priority.BACKGROUND and in_flight:
                continue
            ticket = queue[0]
            ticket.in_flight += 1  # first: between the two the ticket must not look done
            index, block = ticket.pending.popleft()
            if not ticket.pending:
                queue.popleft()
            if in_flight == 0:
                self._busy_since = time.perf_counter()
            self._in_flight[priority] += 1
            return ticket, index, block
        return None

    def _end(
        self, ticket: ReadTicket, index: int, block: _Block, error: MoeServerError | None
    ) -> None:
        """Enters a block that was read. Under the lock."""
        self._in_flight[ticket.priority] -= 1
        self.counters.bytes += block.nbytes if error is None else 0
        if not any(self._in_flight.values()):
            self.counters.busy_s += time.perf_counter() - self._busy_since
        ticket.block_ended(index, error)
        if error is not None:
            self.counters.failures += 1
            with contextlib.suppress(ValueError):
                self._queues[ticket.priority].remove(ticket)
        if any(self._queues.values()):
            self._work.notify()
        elif self._closing:
            self._work.notify_all()

    def _attempt(
        self, ticket: ReadTicket, block: _Block, window: mmap.mmap
    ) -> MoeServerError | None:
        """Reads a block, a few times if need be; what was wrong with the last."""
        segment = block.segment
        for attempt in range(_ATTEMPTS):
            if attempt:
                with self.lock:
                    self.counters.retries += 1
                time.sleep(_RETRY_S)
            try:
                file = self._files.get(segment.file)
            except OSError as failure:
                what = failure.strerror or str(failure)
                continue
            except Exception as failure:  # noqa: BLE001  a dead thread would leave waiters
                what = repr(failure)
                break
            try:
                self._read(file, ticket, block, window)
            except OSError as failure:
                what = failure.strerror or str(failure)
                self._files.renew(segment.file, file)
            except EOFError as failure:
                what = str(failure)
                if not self._files.renew(segment.file, file):
                    break
            except Exception as failure:  # noqa: BLE001  as above
                what = repr(failure)
                break
            else:
                return None
        return MoeServerError(
            f"Reading {block.nbytes} bytes of {segment.file} from byte "
            f"{segment.file_offset + block.start} on failed: {what}.",
            "Check the disk and the file, then try again.",
            reason=Reason.UNAVAILABLE,
        )

    def _read(self, file: OpenFile, ticket: ReadTicket, block: _Block, window: mmap.mmap) -> None:
        segment = block.segment
        offset = segment.file_offset + block.start
        target = ticket.address + segment.record_offset + block.start
        file.read_into(target, offset, block.nbytes, window, ticket.touch)
        if ticket.book.is_empty:
            return
        content = memoryview((ctypes.c_char * block.nbytes).from_address(target)).cast("B")
        wrong = ticket.book.mismatch(segment.file, offset, content)
        if wrong is not None:
            with self.lock:
                self.counters.mismatches += 1
            raise OSError(f"the checksum of the bytes from {wrong} on does not match")
