"""A matrix that stays on disk: the blocks of rows that a step needs are read when it needs them.

For a token embedding, of which a token needs one row: in memory it would take the place of experts.
Nothing is kept from step to step. Knows bytes, no tokens and no requests; `embedding` decodes what
arrives. Used by the engine's one thread; only the reader's threads work beside it.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from moe_server.errors import MoeServerError
from moe_server.kernels.formats import MatrixLayout
from moe_server.offload.checksum import RowChecksums
from moe_server.offload.layout import Segment
from moe_server.offload.pages import address_of, map_pages
from moe_server.offload.reader import Reader, ReadTicket

_POLL_S = 0.01
"""How often a wait for the disk looks whether anybody still wants what it waits for."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Blocks that are the caller's until it asks for the next ones."""

    places: dict[int, int]
    """Block -> its place in `StoredRows.memory`, counted in blocks."""
    errors: dict[int, MoeServerError]
    """Why those that are wanted and could not be read could not be."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    block: int
    place: int
    ticket: ReadTicket


class StoredRows:
    """The matrix, and memory for some of its blocks.

    Args:
        reader: Reads it; stays the caller's.
        file: Where it is.
        offset: Where in the file it begins.
        layout: How it lies there.
        num_places: Blocks that there is memory for.
    """

    def __init__(
        self, reader: Reader, file: Path, offset: int, layout: MatrixLayout, num_places: int
    ) -> None:
        self.layout = layout
        self.num_places = num_places
        self.memory = map_pages(num_places * layout.block_bytes)
        self._reader = reader
        self._file, self._offset = file, offset
        self._checksums = RowChecksums(offset, layout.block_bytes)
        self._free = list(range(num_places))
        self._leaving: list[_Fetch] = []
        """Reads whose places were not taken back yet: a thread may still be writing there."""

    def read_through(self, progress: Callable[[int], None]) -> None:
        """Reads all of it once, to see that it can be read and is what it should be.

        Args:
            progress: Called with the bytes read so far.

        Raises:
            MoeServerError: A read failed.
        """
        total, chunk_bytes = self.layout.nbytes, self._reader.block_bytes
        memory = map_pages(min(total, chunk_bytes))
        for start in range(0, total, chunk_bytes):
            nbytes = min(chunk_bytes, total - start)
            part = Segment(self._file, self._offset + start, nbytes, 0)
            self._reader.submit([part], address_of(memory), owner=memory).wait()
            if not self._reader.book.is_empty:
                self._checksums.take(memoryview(memory)[:nbytes])
            progress(start + nbytes)

    def read(
        self, blocks: Sequence[int], still_wanted: Callable[[Sequence[int]], Sequence[int]]
    ) -> Generator[Arrived, None, None]:
        """Reads blocks ahead of everything else; yields half as many at a time as there are places.

        Args:
            blocks: Distinct numbers of blocks.
            still_wanted: Asked now and then which of some blocks are still of use; a no is for good
                and ends the wait for that block, which is then not among those that arrive.
        """
        left = deque(blocks)
        under_way: deque[list[_Fetch]] = deque()
        try:
            while left or under_way:
                self._collect()
                # Two halves: one is on its way while the caller has the other.
                while left and self._free and len(under_way) < 2:
                    most = min(len(left), len(self._free), -(-self.num_places // 2))
                    under_way.append([self._start(left.popleft()) for _ in range(most)])
                if not under_way:
                    self._await_place()
                    left = deque(still_wanted(left))
                    continue
                ended = self._await(under_way[0], still_wanted)
                yield Arrived(
                    {one.block: one.place for one in ended if one.ticket.complete},
                    {one.block: one.ticket.error for one in ended if one.ticket.error is not None},
                )
                if len(ended) < len(under_way[0]):
                    left = deque(still_wanted(left))
                self._leaving += under_way.popleft()
        finally:
            for fetch in chain.from_iterable(under_way):
                fetch.ticket.cancel()
                self._leaving.append(fetch)

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; for tests and idle moments."""
        places = [*self._free, *(fetch.place for fetch in self._leaving)]
        assert sorted(places) == list(range(self.num_places)), "a place lost, or held twice"

    def _start(self, block: int) -> _Fetch:
        # A ticket each: one that fails or is not wanted any more leaves the others alone, and
        # costs no more than its share of one ticket for all.
        place, nbytes = self._free.pop(), self.layout.block_bytes
        part = Segment(self._file, self._offset + block * nbytes, nbytes, place * nbytes)
        ticket = self._reader.submit(
            [part], address_of(self.memory), owner=self.memory, book=self._checksums
        )
        return _Fetch(block, place, ticket)

    def _await(
        self, fetches: Sequence[_Fetch], still_wanted: Callable[[Sequence[int]], Sequence[int]]
    ) -> list[_Fetch]:
        """Those that ended while they were wanted; the others are cancelled."""
        waiting, ended = deque(fetches), []
        while waiting:
            ticket = waiting[0].ticket
            with contextlib.suppress(MoeServerError):  # it is in the ticket
                ticket.wait(_POLL_S)
            if ticket.done:
                ended.append(waiting.popleft())
                continue
            wanted = set(still_wanted([one.block for one in waiting]))
            for one in waiting:
                if one.block not in wanted:
                    one.ticket.cancel()
            waiting = deque(one for one in waiting if one.block in wanted)
        return ended

    def _collect(self) -> None:
        """Takes back places that no thread writes to any more."""
        leaving, self._leaving = self._leaving, []
        for one in leaving:  # asked once: a read may end at any time
            if one.ticket.done:
                self._free.append(one.place)
            else:
                self._leaving.append(one)

    def _await_place(self) -> None:
        with contextlib.suppress(MoeServerError):  # nobody's any more
            self._leaving[0].ticket.wait(_POLL_S)
