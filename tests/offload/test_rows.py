"""Rows of a matrix on disk: the right bytes, whoever leaves and whatever fails meanwhile."""

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import MatrixLayout, WeightFormat
from moe_server.offload.checksum import ChecksumBook, checksums
from moe_server.offload.reader import Reader
from moe_server.offload.rows import StoredRows

ROWS = 700
WAIT_S = 20.0
LAYOUTS = {
    "fp32": MatrixLayout(ROWS, 1000, WeightFormat.FLOAT32),
    "bf16 of whole pages": MatrixLayout(ROWS, 4096, WeightFormat.BFLOAT16),
    "int8": MatrixLayout(ROWS, 300, WeightFormat.INT8),
}


class Disk:
    """A file with a matrix somewhere in it, and reads that a test may have fail or hang."""

    def __init__(self, path: Path, layout: MatrixLayout, monkeypatch) -> None:
        self.path, self.layout = path, layout
        self.offset = 4096 + (0 if layout.block_bytes % 4096 == 0 else 136)
        self.content = random.Random(7).randbytes(layout.nbytes)
        path.write_bytes(bytes(self.offset) + self.content + bytes(99))
        self.bad: set[int] = set()
        """Blocks whose reads fail."""
        self.failures = 1_000
        """How often they do."""
        self.hanging: set[int] = set()
        self.released = threading.Event()
        real = os.preadv

        def preadv(descriptor, buffers, offset, *flags):
            # What is not aligned is read from the page on that it begins in.
            here = {
                block
                for block in self.bad | self.hanging
                if self.start_of(block) // 4096 * 4096 == offset // 4096 * 4096
            }
            if here & self.hanging:
                assert self.released.wait(WAIT_S)
            if here & self.bad and self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr("moe_server.offload.reader._RETRY_S", 0.0)

    def start_of(self, block: int) -> int:
        return self.offset + block * self.layout.block_bytes

    def block(self, number: int) -> bytes:
        size = self.layout.block_bytes
        return self.content[number * size : (number + 1) * size]


@pytest.fixture(params=LAYOUTS)
def disk(request, tmp_path, monkeypatch) -> Disk:
    return Disk(tmp_path / "matrix", LAYOUTS[request.param], monkeypatch)


@pytest.fixture
def whole_pages(tmp_path, monkeypatch) -> Disk:
    return Disk(tmp_path / "matrix", LAYOUTS["bf16 of whole pages"], monkeypatch)


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader(4, 2**21)
    yield reader
    reader.close()


def rows_of(disk: Disk, reader: Reader, num_places: int) -> StoredRows:
    return StoredRows(reader, disk.path, disk.offset, disk.layout, num_places)


def everything(asked):
    return list(asked)


def taken(rows: StoredRows, blocks, still_wanted=everything):
    """What arrived by block, and the errors."""
    content, errors = {}, {}
    size = rows.layout.block_bytes
    for arrived in rows.read(blocks, still_wanted):
        assert not arrived.places.keys() & (content.keys() | arrived.errors.keys())
        for block, place in arrived.places.items():
            content[block] = bytes(rows.memory[place * size : (place + 1) * size])
        errors |= arrived.errors
    rows.check_integrity()
    return content, errors


@pytest.mark.parametrize("num_places", [1, 2, 5, 64])
def test_every_block_arrives_once_and_whole(disk, reader, num_places):
    rows = rows_of(disk, reader, num_places)
    total = disk.layout.num_blocks
    choose = random.Random(num_places)
    for count in (1, 2, 7, min(total, 200), 0):
        blocks = choose.sample(range(total), count)
        content, errors = taken(rows, blocks)
        assert not errors
        assert content == {block: disk.block(block) for block in blocks}
    ends, _ = taken(rows, [total - 1, 0])
    assert ends == {block: disk.block(block) for block in (0, total - 1)}


def test_only_what_cannot_be_read_fails(disk, reader):
    rows = rows_of(disk, reader, 4)
    disk.bad = {disk.layout.num_blocks // 2}
    near = [block + step for block in disk.bad for step in (-20, -9, 0, 9, 20)]
    content, errors = taken(rows, near)
    assert errors.keys() == disk.bad
    assert content == {block: disk.block(block) for block in near if block not in disk.bad}
    [error] = errors.values()
    assert error.reason is Reason.UNAVAILABLE
    assert str(disk.path) in error.message
    assert os.strerror(errno.EIO) in error.message
    disk.bad = set()
    assert taken(rows, near) == ({block: disk.block(block) for block in near}, {})


def test_an_error_that_passes_is_nobody_s(disk, reader):
    rows = rows_of(disk, reader, 4)
    disk.bad, disk.failures = {3}, 2
    assert taken(rows, [3, 17]) == ({block: disk.block(block) for block in (3, 17)}, {})
    assert reader.counters.retries == 2


def test_nobody_waits_for_a_block_that_is_not_wanted_any_more(whole_pages, reader):
    disk, rows = whole_pages, rows_of(whole_pages, reader, 4)
    disk.hanging = {5}
    asked = []

    def still_wanted(blocks):
        asked.append(list(blocks))
        return [block for block in blocks if block != 5]

    blocks = [1, 5, 9, 300, 301, 302, 303, 304]
    content, errors = taken(rows, blocks, still_wanted)
    assert not disk.released.is_set()
    assert not errors
    assert content == {block: disk.block(block) for block in blocks if block != 5}
    assert asked
    # Its place is not given to anybody while a thread may write there.
    for _ in range(3):
        content, _ = taken(rows, [7, 8, 10, 11])
        assert content == {block: disk.block(block) for block in (7, 8, 10, 11)}
    disk.released.set()
    disk.hanging = set()
    while rows._leaving:
        assert taken(rows, [5])[0] == {5: disk.block(5)}
        rows._collect()
    assert sorted(rows._free) == [0, 1, 2, 3]


def test_what_nobody_wants_any_more_leaves_the_queue(whole_pages, reader):
    disk, rows = whole_pages, rows_of(whole_pages, reader, 16)
    disk.hanging = set(range(16))
    assert taken(rows, range(16), lambda _asked: []) == ({}, {})
    assert len(rows._leaving) > 4
    # Threads hang in some of them; none of the others is begun any more.
    assert not any(one.ticket.pending for one in rows._leaving)
    disk.released.set()


def test_where_all_places_hang_it_waits_for_those_who_still_want(whole_pages, reader):
    disk, rows = whole_pages, rows_of(whole_pages, reader, 2)
    disk.hanging = {1, 2}
    assert taken(rows, [1, 2], lambda _asked: []) == ({}, {})
    # Now nothing is free: one who leaves is not held, one who stays gets its row in the end.
    assert taken(rows, [3], lambda _asked: []) == ({}, {})
    looks = []

    def still_wanted(asked):
        looks.append(asked)
        disk.released.set()
        return list(asked)

    assert taken(rows, [3], still_wanted) == ({3: disk.block(3)}, {})
    assert looks


def test_giving_up_in_the_middle_loses_no_place(disk, reader):
    rows = rows_of(disk, reader, 4)
    for count in (1, 3, 20):
        arriving = rows.read(range(count), everything)
        next(arriving)
        arriving.close()
        rows.check_integrity()
    blocks = range(20, 40)
    assert taken(rows, blocks)[0] == {block: disk.block(block) for block in blocks}


# Checksums


def known_book(disk: Disk, piece_bytes: int) -> ChecksumBook:
    pieces = checksums(memoryview(disk.content), piece_bytes)
    known = {
        (disk.path, disk.offset + number * piece_bytes): piece
        for number, piece in enumerate(pieces)
    }
    return ChecksumBook(known, piece_bytes=piece_bytes)


@pytest.mark.parametrize("learns", [True, False])
def test_rows_are_held_to_what_the_whole_matrix_was(disk, learns):
    piece_bytes = 8192
    book = (
        ChecksumBook(learn=True, piece_bytes=piece_bytes)
        if learns
        else known_book(disk, piece_bytes)
    )
    reader = Reader(2, 3 * piece_bytes, book)
    rows = rows_of(disk, reader, 4)
    seen = []
    rows.read_through(seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == disk.layout.nbytes
    blocks = range(disk.layout.num_blocks)
    assert taken(rows, blocks) == ({block: disk.block(block) for block in blocks}, {})
    # 0 is where a piece begins, too.
    damaged = [0, 1, disk.layout.num_blocks - 1]
    with disk.path.open("r+b") as file:
        for block in damaged:
            file.seek(disk.start_of(block) + 5)
            file.write(bytes([disk.block(block)[5] ^ 1]))
    content, errors = taken(rows, blocks)
    assert list(errors) == damaged
    assert all("checksum" in error.message for error in errors.values())
    assert content == {block: disk.block(block) for block in blocks if block not in damaged}
    reader.close()


def test_a_matrix_that_is_not_what_its_checksums_say_is_refused(disk):
    book = known_book(disk, 8192)
    with disk.path.open("r+b") as file:
        file.seek(disk.start_of(2))
        file.write(bytes([disk.block(2)[0] ^ 1]))
    reader = Reader(2, 16384, book)
    rows = rows_of(disk, reader, 4)
    with pytest.raises(MoeServerError, match="checksum"):
        rows.read_through(lambda _done: None)
    reader.close()


def test_reading_through_finds_what_cannot_be_read(disk, reader):
    rows = rows_of(disk, reader, 4)
    # A block of the reader begins there.
    disk.bad = {0}
    with pytest.raises(MoeServerError, match=os.strerror(errno.EIO)):
        rows.read_through(lambda _done: None)
