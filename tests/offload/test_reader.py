"""The reader against a file it cannot know: every alignment, and every way the file can fail it."""

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import random
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.checksum import ChecksumBook, checksums
from moe_server.offload.layout import PAGE_BYTES, Segment
from moe_server.offload.reader import Priority, Reader, ReadTicket

CHUNK_BYTES = 2 * PAGE_BYTES
CONTENT = random.Random(0).randbytes(11 * PAGE_BYTES + 1234)
UNTOUCHED = 0xEE
WAIT_S = 20


class Target:
    """Page-aligned memory that shows where it was written."""

    def __init__(self, size: int = 16 * PAGE_BYTES) -> None:
        self.memory = mmap.mmap(-1, size)
        self.memory[:] = bytes([UNTOUCHED]) * size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def holds(self, content: bytes, offset: int) -> None:
        """Asserts that `content` is at `offset` and nothing was written around it."""
        end = offset + len(content)
        assert self.memory[offset:end] == content
        around = self.memory[:offset] + self.memory[end:]
        assert around == bytes([UNTOUCHED]) * len(around), "the reader wrote outside its target"


class Gate:
    """Stands in for os.preadv: each call waits until the test lets it go."""

    def __init__(self, monkeypatch) -> None:
        self.offsets = []
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        real = os.preadv

        def preadv(descriptor, buffers, offset, *flags):
            self.offsets.append(offset)
            self.entered.release()
            assert self.opened.wait(WAIT_S)
            return real(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)

    def await_call(self) -> None:
        assert self.entered.acquire(timeout=WAIT_S)


@contextmanager
def running_reader(num_threads=2, chunk_bytes=CHUNK_BYTES):
    reader = Reader(num_threads, chunk_bytes)
    try:
        yield reader
    finally:
        reader.close()


def refuse_direct(monkeypatch) -> None:
    """A file system without O_DIRECT."""
    real = os.open

    def without_direct(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without_direct)


def read(reader, segments, target, offset=0) -> None:
    reader.submit(segments, target.address + offset).wait()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["direct", "buffered"])
def reader(request, monkeypatch):
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    with running_reader() as reader:
        yield reader


@pytest.fixture(scope="module", params=["direct", "buffered"])
def open_file(request, tmp_path_factory):
    """A reader that has the file open in the way that is asked for."""
    path = tmp_path_factory.mktemp("reader") / "shard"
    path.write_bytes(CONTENT)
    with running_reader() as reader:
        with pytest.MonkeyPatch.context() as monkeypatch:
            if request.param == "buffered":
                refuse_direct(monkeypatch)
            read(reader, [Segment(path, 0, 1, 0)], Target())
        yield reader, path


def near_pages(largest):
    """Offsets and lengths: any, with page boundaries and their neighbours drawn often."""
    page = st.integers(0, largest // PAGE_BYTES).map(lambda number: number * PAGE_BYTES)
    beside = st.tuples(page, st.integers(-2, 2)).map(sum)
    return st.one_of(page, beside, st.integers(0, largest)).filter(lambda n: 0 <= n <= largest)


@given(
    file_offset=near_pages(len(CONTENT)),
    nbytes=near_pages(len(CONTENT)),
    target_offset=near_pages(3 * PAGE_BYTES),
)
@settings(max_examples=150)
def test_every_alignment_brings_the_file_s_bytes(open_file, file_offset, nbytes, target_offset):
    reader, path = open_file
    nbytes = min(nbytes, len(CONTENT) - file_offset)
    target = Target()
    read(reader, [Segment(path, file_offset, nbytes, 0)], target, target_offset)
    target.holds(CONTENT[file_offset : file_offset + nbytes], target_offset)


def test_segments_of_several_files_land_at_their_record_offsets(reader, tmp_path):
    pieces = [(5, 3 * CHUNK_BYTES + 7, 20_000), (CHUNK_BYTES, CHUNK_BYTES, 0), (1, 3, 9_000)]
    segments, target = [], Target()
    expected = bytearray(target.memory[:])
    for number, (file_offset, nbytes, record_offset) in enumerate(pieces):
        content = random.Random(number).randbytes(file_offset + nbytes)
        path = tmp_path / f"shard-{number}"
        path.write_bytes(content)
        segments.append(Segment(path, file_offset, nbytes, record_offset))
        expected[record_offset : record_offset + nbytes] = content[file_offset:]
    read(reader, segments, target)
    assert target.memory[:] == bytes(expected)


def test_nothing_to_read_is_done_at_once(reader):
    ticket = reader.submit([], 0)
    assert ticket.done
    ticket.wait()


@pytest.mark.parametrize("aligned", [True, False])
def test_a_file_truncated_while_open_is_an_error_past_its_end(reader, file, aligned):
    shift = 0 if aligned else 1
    whole = Segment(file, shift, 3 * CHUNK_BYTES, 0)
    read(reader, [whole], Target())
    os.truncate(file, 3 * PAGE_BYTES + 100)
    with pytest.raises(MoeServerError) as caught:
        read(reader, [whole], Target())
    assert caught.value.reason is Reason.UNAVAILABLE
    assert str(file) in caught.value.message
    assert f"it ends at byte {3 * PAGE_BYTES + 100}" in caught.value.message
    # What is left of it can still be read, and all of it again once it is back.
    target = Target()
    read(reader, [Segment(file, shift, 3 * PAGE_BYTES, 0)], target)
    target.holds(CONTENT[shift : shift + 3 * PAGE_BYTES], 0)
    with file.open("r+b") as stream:
        stream.write(CONTENT)
    target = Target()
    read(reader, [whole], target)
    target.holds(CONTENT[shift : shift + 3 * CHUNK_BYTES], 0)


def test_a_file_deleted_while_open_can_still_be_read(reader, file):
    read(reader, [Segment(file, 0, 1, 0)], Target())
    file.unlink()
    target = Target()
    read(reader, [Segment(file, 10, 30_000, 0)], target)
    target.holds(CONTENT[10:30_010], 0)


def test_a_missing_file_is_an_error_until_it_is_there(reader, file):
    hidden = file.rename(file.with_name("hidden"))
    with pytest.raises(MoeServerError, match="No such file") as caught:
        read(reader, [Segment(file, 0, 100, 0)], Target())
    assert caught.value.reason is Reason.UNAVAILABLE
    assert str(file) in caught.value.message
    assert caught.value.remedy
    hidden.rename(file)
    target = Target()
    read(reader, [Segment(file, 0, 100, 0)], target)
    target.holds(CONTENT[:100], 0)


def test_an_io_error_ends_the_read_and_not_the_reader(reader, file, monkeypatch):
    segment = Segment(file, 0, 4 * CHUNK_BYTES, 0)
    real, failing = os.preadv, [2 * CHUNK_BYTES]

    def preadv(descriptor, buffers, offset, *flags):
        if offset in failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(MoeServerError, match="Input/output error") as caught:
        read(reader, [segment], Target())
    assert caught.value.reason is Reason.UNAVAILABLE
    failing.clear()
    target = Target()
    read(reader, [segment], target)
    target.holds(CONTENT[: 4 * CHUNK_BYTES], 0)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("most", [PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES - 512])
def test_short_reads_go_on_where_they_stopped(reader, file, monkeypatch, shift, most):
    shorten(monkeypatch, most)
    target = Target()
    read(reader, [Segment(file, shift, 9 * PAGE_BYTES, 0)], target)
    target.holds(CONTENT[shift : shift + 9 * PAGE_BYTES], 0)


def test_a_buffered_read_may_stop_within_a_page(file, monkeypatch):
    refuse_direct(monkeypatch)
    shorten(monkeypatch, 1000)
    target = Target()
    with running_reader() as reader:
        read(reader, [Segment(file, 7, 3 * PAGE_BYTES, 0)], target)
    target.holds(CONTENT[7 : 7 + 3 * PAGE_BYTES], 0)


def shorten(monkeypatch, most) -> None:
    """No read brings more than `most` bytes; what lies behind them is rubbish."""
    real = os.preadv

    def preadv(descriptor, buffers, offset, *flags):
        [buffer] = buffers
        count = min(most, real(descriptor, buffers, offset, *flags))
        bytes_of = memoryview(buffer).cast("B")
        bytes_of[count:] = bytes(len(bytes_of) - count)
        return count

    monkeypatch.setattr(os, "preadv", preadv)


def test_only_the_refusal_of_direct_reads_is_answered_with_buffered_ones(file, monkeypatch):
    def refuse(path, flags, *_args, **_kwargs):
        assert flags & os.O_DIRECT, "opened again after an error that says nothing of O_DIRECT"
        raise OSError(errno.EACCES, "Permission denied")

    with running_reader() as reader:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(MoeServerError, match="Permission denied"):
            read(reader, [Segment(file, 0, 100, 0)], Target())


def test_a_read_cancelled_before_it_began_reads_nothing(file, monkeypatch):
    gate, target = Gate(monkeypatch), Target()
    with running_reader(num_threads=1) as reader:
        first = reader.submit([Segment(file, 0, PAGE_BYTES, 0)], target.address)
        gate.await_call()
        second = reader.submit([Segment(file, PAGE_BYTES, 3 * CHUNK_BYTES, 0)], Target().address)
        second.cancel()
        assert second.done, "no thread has it, so its target is free at once"
        with pytest.raises(MoeServerError, match="cancelled"):
            second.wait()
        gate.opened.set()
        first.wait()
    assert gate.offsets == [0]
    target.holds(CONTENT[:PAGE_BYTES], 0)


def test_a_read_cancelled_on_its_way_ends_with_the_chunk_that_is_being_read(file, monkeypatch):
    gate, target = Gate(monkeypatch), Target()
    with running_reader(num_threads=1) as reader:
        ticket = reader.submit([Segment(file, 0, 4 * CHUNK_BYTES, 0)], target.address)
        gate.await_call()
        ticket.cancel()
        assert not ticket.done, "its target is still being written"
        gate.opened.set()
        with pytest.raises(MoeServerError, match="cancelled"):
            ticket.wait()
    assert gate.offsets == [0]


def test_a_read_under_way_looks_done_at_no_point(file, monkeypatch):
    """Who asks without the lock would take it for a read that was cancelled."""
    looked_done = []

    class Pending(deque):
        def popleft(self):
            taken = super().popleft()
            looked_done.append(ticket.done)
            return taken

    class Arrived(list):
        def __setitem__(self, index, arrived):
            super().__setitem__(index, arrived)
            looked_done.append(ticket.done)

    class Watched(ReadTicket):
        def __init__(self, *args):
            nonlocal ticket
            super().__init__(*args)
            ticket = self
            self.pending, self._arrived = Pending(self.pending), Arrived(self._arrived)

    ticket: ReadTicket
    monkeypatch.setattr("moe_server.offload.reader.ReadTicket", Watched)
    with running_reader(num_threads=1) as reader:
        read(reader, [Segment(file, 0, 2 * CHUNK_BYTES, 0)], Target())
    assert looked_done == [False] * 4


def test_a_read_cancelled_after_its_end_has_succeeded(reader, file):
    ticket = reader.submit([Segment(file, 0, 100, 0)], (target := Target()).address)
    ticket.wait()
    ticket.cancel()
    ticket.wait()
    target.holds(CONTENT[:100], 0)


def test_a_read_that_ended_keeps_nobody_s_memory(file):
    class Owner:
        pass

    owner = Owner()
    released = threading.Event()
    weakref.finalize(owner, released.set)
    with running_reader() as reader:
        target = Target()
        reader.submit([Segment(file, 0, 4 * CHUNK_BYTES, 0)], target.address, owner=owner).wait()
        del owner
        gc.collect()
        assert released.wait(WAIT_S)


def test_closing_finishes_what_is_queued(file, monkeypatch):
    gate = Gate(monkeypatch)
    reader = Reader(2, CHUNK_BYTES)
    targets = [Target() for _ in range(20)]
    tickets = [
        reader.submit([Segment(file, number, 3 * CHUNK_BYTES, 0)], target.address)
        for number, target in enumerate(targets)
    ]
    gate.await_call()
    closing = threading.Thread(target=reader.close)
    closing.start()
    gate.opened.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    for number, (ticket, target) in enumerate(zip(tickets, targets, strict=True)):
        assert ticket.done
        ticket.wait()
        target.holds(CONTENT[number : number + 3 * CHUNK_BYTES], 0)


@pytest.mark.parametrize("seed", range(3))
def test_many_reads_side_by_side_do_not_meet(open_file, seed):
    _, path = open_file
    choose = random.Random(seed)
    with running_reader(num_threads=4) as reader:
        reads = []
        for _ in range(150):
            offset = choose.randrange(len(CONTENT))
            nbytes = choose.randrange(len(CONTENT) - offset + 1)
            shift = choose.choice([0, 0, choose.randrange(PAGE_BYTES)])
            target = Target()
            ticket = reader.submit([Segment(path, offset, nbytes, shift)], target.address)
            cancelled = choose.random() < 0.2
            if cancelled:
                ticket.cancel()
            reads.append((ticket, target, cancelled, shift, CONTENT[offset : offset + nbytes]))
        for ticket, target, cancelled, shift, expected in reads:
            try:
                ticket.wait()
            except MoeServerError:
                assert cancelled
            else:
                target.holds(expected, shift)


def cached_pages(path: Path) -> int:
    """How many of a file's pages the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapping:
        count = -(-len(mapping) // PAGE_BYTES)
        residency = (ctypes.c_ubyte * count)()
        address = ctypes.c_char.from_buffer(mapping)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(mapping)), residency
        )
        del address
        assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in residency)


def test_reads_leave_nothing_in_the_page_cache(reader, file):
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if cached_pages(file):
        pytest.skip("this file system keeps its pages whatever one asks for")
    read(reader, [Segment(file, 0, 11 * PAGE_BYTES, 0)], Target())
    assert not cached_pages(file)


def test_a_kernel_without_huge_pages_is_served_too(file, monkeypatch):
    class SmallPages(mmap.mmap):
        def madvise(self, *_args):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", SmallPages)
    with running_reader() as reader:
        ticket = reader.submit([Segment(file, 1, 100, 0)], (target := Target()).address)
        ticket.wait_beyond(0, WAIT_S)
        assert ticket.done, "the reader's threads are dead"
        ticket.wait()
    target.holds(CONTENT[1:101], 0)


# Who goes first


def blocks_of(number: int, first: int = 0) -> list[int]:
    """Offsets of `number` blocks from block `first` of the file on."""
    return [CHUNK_BYTES * (first + index) for index in range(number)]


def submit_blocks(reader, file, number, first, priority, target=None):
    segment = Segment(file, CHUNK_BYTES * first, CHUNK_BYTES * number, 0)
    target = target or Target()
    return reader.submit([segment], target.address, priority, owner=target)


def test_demand_goes_before_a_prefetch_that_was_there_first(file, monkeypatch):
    gate, targets = Gate(monkeypatch), [Target(), Target()]
    with running_reader(num_threads=1) as reader:
        submit_blocks(reader, file, 3, 0, Priority.PREFETCH, targets[0])
        gate.await_call()
        submit_blocks(reader, file, 2, 3, Priority.DEMAND, targets[1])
        gate.opened.set()
    assert gate.offsets == [0, *blocks_of(2, 3), *blocks_of(2, 1)]
    targets[0].holds(CONTENT[: 3 * CHUNK_BYTES], 0)
    targets[1].holds(CONTENT[3 * CHUNK_BYTES : 5 * CHUNK_BYTES], 0)


def test_two_blocks_of_prefetches_are_all_that_a_demand_read_finds_before_it(file, monkeypatch):
    gate, targets = Gate(monkeypatch), [Target(), Target()]
    with running_reader(num_threads=4) as reader:
        submit_blocks(reader, file, 3, 0, Priority.PREFETCH, targets[0])
        for _ in range(2):
            gate.await_call()
        # Two threads have nothing to do; a third block of the prefetch would keep one from this.
        submit_blocks(reader, file, 2, 3, Priority.DEMAND, targets[1])
        for _ in range(2):
            gate.await_call()
        assert sorted(gate.offsets) == [*blocks_of(2), *blocks_of(2, 3)]
        gate.opened.set()
    targets[0].holds(CONTENT[: 3 * CHUNK_BYTES], 0)


def test_a_preload_uses_the_whole_depth_and_goes_last(file, monkeypatch):
    gate, targets = Gate(monkeypatch), [Target() for _ in range(3)]
    with running_reader(num_threads=3) as reader:
        submit_blocks(reader, file, 3, 0, Priority.PRELOAD, targets[0])
        for _ in range(3):
            gate.await_call()
        submit_blocks(reader, file, 1, 2, Priority.PRELOAD, targets[0])
        submit_blocks(reader, file, 1, 3, Priority.PREFETCH, targets[1])
        submit_blocks(reader, file, 1, 4, Priority.DEMAND, targets[2])
        reader.depth = 1  # so that the order of beginning shows
        gate.opened.set()
    assert sorted(gate.offsets[:3]) == blocks_of(3)
    assert gate.offsets[3:] == [*blocks_of(1, 4), *blocks_of(1, 3), *blocks_of(1, 2)]


def test_background_reads_wait_until_nothing_else_is_read(file, monkeypatch):
    gate, targets = Gate(monkeypatch), [Target() for _ in range(2)]
    with running_reader(num_threads=3) as reader:
        submit_blocks(reader, file, 3, 0, Priority.BACKGROUND, targets[0])
        gate.await_call()
        # Two threads have nothing to do. A second block of the background would be before these.
        submit_blocks(reader, file, 2, 3, Priority.DEMAND, targets[1])
        for _ in range(2):
            gate.await_call()
        assert sorted(gate.offsets) == [0, *blocks_of(2, 3)]
        gate.opened.set()
    assert gate.offsets[3:] == blocks_of(2, 1)
    targets[0].holds(CONTENT[: 3 * CHUNK_BYTES], 0)


@pytest.mark.parametrize("priority", [Priority.DEMAND, Priority.PREFETCH, Priority.PRELOAD])
def test_no_background_block_is_begun_beside_another_read(file, monkeypatch, priority):
    gate, targets = Gate(monkeypatch), [Target() for _ in range(2)]
    with running_reader(num_threads=2) as reader:
        submit_blocks(reader, file, 1, 0, priority, targets[0])
        gate.await_call()
        submit_blocks(reader, file, 1, 1, Priority.BACKGROUND, targets[1])
        with reader.lock:
            assert reader._take() is None
        gate.opened.set()
    targets[1].holds(CONTENT[CHUNK_BYTES : 2 * CHUNK_BYTES], 0)


def test_a_promoted_prefetch_overtakes_the_others(file, monkeypatch):
    gate, targets = Gate(monkeypatch), [Target(), Target()]
    with running_reader(num_threads=1) as reader:
        submit_blocks(reader, file, 2, 0, Priority.PREFETCH, targets[0])
        gate.await_call()
        second = submit_blocks(reader, file, 3, 2, Priority.PREFETCH, targets[1])
        second.promote()
        assert second.priority is Priority.DEMAND
        second.promote()
        gate.opened.set()
    assert gate.offsets == [0, *blocks_of(3, 2), CHUNK_BYTES]
    targets[1].holds(CONTENT[2 * CHUNK_BYTES : 5 * CHUNK_BYTES], 0)


def test_a_promoted_read_s_blocks_hold_no_prefetch_back(file, monkeypatch):
    gate = Gate(monkeypatch)
    targets = [Target(), Target()]
    with running_reader(num_threads=4) as reader:
        first = submit_blocks(reader, file, 2, 0, Priority.PREFETCH, targets[0])
        submit_blocks(reader, file, 3, 2, Priority.PREFETCH, targets[1])
        for _ in range(2):
            gate.await_call()
        first.promote()
        for _ in range(2):
            gate.await_call()
        assert sorted(gate.offsets) == blocks_of(4)
        gate.opened.set()
    targets[1].holds(CONTENT[2 * CHUNK_BYTES : 5 * CHUNK_BYTES], 0)


# Leaving


def test_cancelling_takes_milliseconds(tmp_path):
    path, size, block = tmp_path / "large", 48 * 2**20, 2 * 2**20
    path.write_bytes(random.Random(1).randbytes(2**20) * (size // 2**20))
    took_s, read_bytes = [], []
    target = Target(size)
    with running_reader(num_threads=4, chunk_bytes=block) as reader:
        for _ in range(5):
            queued = reader.submit([Segment(path, 0, size, 0)], target.address)
            waiting = reader.submit([Segment(path, 0, size, 0)], target.address)
            queued.wait_beyond(0, WAIT_S)
            started = time.perf_counter()
            waiting.cancel()
            queued.cancel()
            with pytest.raises(MoeServerError, match="cancelled"):
                queued.wait(WAIT_S)
            took_s.append(time.perf_counter() - started)
            read_bytes.append(queued.read_bytes)
            assert waiting.read_bytes == 0
    assert min(took_s) < 0.1, f"free {took_s} s after cancelling"
    assert min(read_bytes) < size, "it was not cancelled on its way"


# Arriving


class Turnstile:
    """Stands in for os.preadv: the read at an offset waits until the test lets it through."""

    def __init__(self, monkeypatch, fails=()) -> None:
        self.passes = {offset: threading.Event() for offset in blocks_of(5)}
        real = os.preadv

        def preadv(descriptor, buffers, offset, *flags):
            assert self.passes[offset].wait(WAIT_S)
            if offset in fails:
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", preadv)

    def let(self, block: int) -> None:
        self.passes[block * CHUNK_BYTES].set()


def await_bytes(ticket, nbytes: int) -> None:
    with ticket.changed:
        assert ticket.changed.wait_for(lambda: ticket.read_bytes == nbytes, WAIT_S)


def test_blocks_out_of_order_grow_the_front_only_without_a_gap(file, monkeypatch):
    turnstile, target = Turnstile(monkeypatch), Target()
    with running_reader(num_threads=4) as reader:
        ticket = submit_blocks(reader, file, 4, 0, Priority.DEMAND, target)
        assert ticket.wait_beyond(0, 0.0) == 0
        turnstile.let(2)
        await_bytes(ticket, CHUNK_BYTES)
        assert ticket.wait_beyond(0, 0.0) == 0, "what is behind a gap cannot be used"
        turnstile.let(0)
        assert ticket.wait_beyond(0, WAIT_S) == CHUNK_BYTES
        assert target.memory[:CHUNK_BYTES] == CONTENT[:CHUNK_BYTES]
        turnstile.let(1)
        assert ticket.wait_beyond(CHUNK_BYTES, WAIT_S) == 3 * CHUNK_BYTES
        assert target.memory[: 3 * CHUNK_BYTES] == CONTENT[: 3 * CHUNK_BYTES]
        assert not ticket.complete
        turnstile.let(3)
        assert ticket.wait_beyond(3 * CHUNK_BYTES, WAIT_S) == 4 * CHUNK_BYTES
        assert ticket.complete
        # At its end it returns at once.
        assert ticket.wait_beyond(4 * CHUNK_BYTES, WAIT_S) == 4 * CHUNK_BYTES
    target.holds(CONTENT[: 4 * CHUNK_BYTES], 0)


def test_a_failure_is_told_while_other_blocks_hang(file, monkeypatch):
    turnstile = Turnstile(monkeypatch, fails=[CHUNK_BYTES])
    with running_reader(num_threads=2) as reader:
        ticket = submit_blocks(reader, file, 5, 0, Priority.DEMAND)
        turnstile.let(1)
        with ticket.changed:
            assert ticket.changed.wait_for(lambda: ticket.error is not None, WAIT_S)
        with pytest.raises(MoeServerError, match="Input/output error"):
            ticket.wait_beyond(0, WAIT_S)
        assert not ticket.done, "the first block is still being written"
        turnstile.let(0)
        with pytest.raises(MoeServerError, match="Input/output error"):
            ticket.wait(WAIT_S)
        assert ticket.done
        assert ticket.read_bytes == CHUNK_BYTES


# Trying again


def faulty_calls(monkeypatch, fault):
    """`fault(call number, bytes read)` acts on every read; returns how many calls there were."""
    real, calls, lock = os.preadv, [0], threading.Lock()

    def preadv(descriptor, buffers, offset, *flags):
        with lock:
            calls[0] += 1
            call = calls[0]
        count = real(descriptor, buffers, offset, *flags)
        [buffer] = buffers
        fault(call, memoryview(buffer).cast("B"))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


@pytest.mark.parametrize("num_errors", [1, 2])
def test_an_io_error_that_passes_is_read_again(reader, file, monkeypatch, num_errors):
    def fault(call, _content):
        if call <= num_errors:
            raise OSError(errno.EIO, "Input/output error")

    faulty_calls(monkeypatch, fault)
    target = Target()
    read(reader, [Segment(file, 7, CHUNK_BYTES, 0)], target)
    target.holds(CONTENT[7 : 7 + CHUNK_BYTES], 0)
    assert reader.counters.retries == num_errors
    assert reader.counters.bytes == CHUNK_BYTES


def test_an_io_error_that_stays_fails_and_names_its_place(reader, file, monkeypatch):
    def fault(_call, _content):
        raise OSError(errno.EIO, "Input/output error")

    calls = faulty_calls(monkeypatch, fault)
    with pytest.raises(MoeServerError) as caught:
        read(reader, [Segment(file, 7, 100, 0)], Target())
    assert caught.value.message == (
        f"Reading 100 bytes of {file} from byte 7 on failed: Input/output error."
    )
    assert caught.value.reason is Reason.UNAVAILABLE
    assert calls == [3]
    assert (reader.counters.retries, reader.counters.bytes) == (2, 0)
    assert reader.counters.busy_s > 0


# Integrity

RANGE = (100, 3 * CHUNK_BYTES + 500)
"""Offset and length of a range with checksums, one of a page each."""


def make_book(file: Path) -> ChecksumBook:
    start, nbytes = RANGE
    found = checksums(memoryview(CONTENT[start : start + nbytes]), PAGE_BYTES)
    known = {(file, start + index * PAGE_BYTES): one for index, one in enumerate(found)}
    return ChecksumBook(known, piece_bytes=PAGE_BYTES)


@contextmanager
def checking_reader(book):
    reader = Reader(2, CHUNK_BYTES, book)
    try:
        yield reader
    finally:
        reader.close()


def test_a_bit_flipped_on_the_way_is_read_again(file, monkeypatch):
    def fault(call, content):
        if call == 2:
            content[len(content) // 2] ^= 16

    target = Target()
    with checking_reader(make_book(file)) as reader:
        faulty_calls(monkeypatch, fault)
        read(reader, [Segment(file, *RANGE, 0)], target)
        target.holds(CONTENT[RANGE[0] : sum(RANGE)], 0)
        assert (reader.counters.mismatches, reader.counters.retries) == (1, 1)


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("piece", [0, 1, 4, 6])
def test_a_bit_flipped_on_the_disk_fails_and_names_its_place(file, piece):
    segment, place = Segment(file, *RANGE, 0), RANGE[0] + piece * PAGE_BYTES
    with checking_reader(make_book(file)) as reader:
        for offset in (place, min(place + PAGE_BYTES, sum(RANGE)) - 1):
            flip(file, offset)
            with pytest.raises(MoeServerError) as caught:
                read(reader, [segment], Target())
            assert caught.value.reason is Reason.UNAVAILABLE
            assert str(file) in caught.value.message
            assert f"the checksum of the bytes from {place} on" in caught.value.message
            assert caught.value.remedy
            flip(file, offset)
        # What is beside the range is nobody's business.
        flip(file, RANGE[0] - 1)
        flip(file, sum(RANGE))
        read(reader, [segment], target := Target())
        target.holds(CONTENT[RANGE[0] : sum(RANGE)], 0)


def test_bytes_are_not_told_of_before_they_are_checked(file, monkeypatch):
    def fault(_call, content):
        content[200] ^= 1

    target = Target()
    with checking_reader(make_book(file)) as reader:
        faulty_calls(monkeypatch, fault)
        ticket = reader.submit([Segment(file, *RANGE, 0)], target.address)
        with pytest.raises(MoeServerError, match="checksum"):
            ticket.wait()
        assert ticket.arrived_bytes == 0
        assert ticket.read_bytes == 0


def test_a_file_that_changes_under_the_server_is_noticed_where_it_was_read_before(file):
    with checking_reader(ChecksumBook(learn=True, piece_bytes=PAGE_BYTES)) as reader:
        known, other = Segment(file, *RANGE, 0), Segment(file, 9 * PAGE_BYTES, 100, 0)
        for _ in range(2):
            read(reader, [known], Target())
        assert reader.counters.mismatches == 0
        flip(file, RANGE[0] + 5 * PAGE_BYTES)
        flip(file, 9 * PAGE_BYTES)
        with pytest.raises(MoeServerError, match="checksum"):
            read(reader, [known], Target())
        # Nobody knows what this was before.
        read(reader, [other], Target())
        flip(file, RANGE[0] + 5 * PAGE_BYTES)
        read(reader, [known], Target())


# Files that are put back


@pytest.mark.parametrize("shift", [0, 3])
def test_a_file_that_another_took_the_place_of_is_read_once_the_old_one_fails(reader, file, shift):
    segment = Segment(file, shift, 3 * CHUNK_BYTES, 0)
    read(reader, [segment], Target())
    os.truncate(file, 10)
    copy = file.with_name("copy")
    copy.write_bytes(CONTENT)
    copy.rename(file)
    for _ in range(2):
        read(reader, [segment], target := Target())
        target.holds(CONTENT[shift : shift + 3 * CHUNK_BYTES], 0)


def test_a_file_of_another_size_is_not_taken_for_the_one_that_failed(reader, file):
    segment = Segment(file, 0, CHUNK_BYTES, 0)
    read(reader, [segment], Target())
    os.truncate(file, 10)
    other = file.with_name("other")
    other.write_bytes(CONTENT + b"more")
    other.rename(file)
    with pytest.raises(MoeServerError, match="it ends at byte 10"):
        read(reader, [segment], Target())


# File systems


def test_files_in_memory_are_served_however_they_can_be_opened():
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm here")
    path = folder / f"moe-server-test-{os.getpid()}"
    try:
        path.write_bytes(CONTENT)
        with running_reader() as reader:
            for shift in (0, 5):
                read(reader, [Segment(path, shift, 5 * CHUNK_BYTES, 0)], target := Target())
                target.holds(CONTENT[shift : shift + 5 * CHUNK_BYTES], 0)
            assert reader.buffered_files == (not can_open_direct(path))
    finally:
        path.unlink(missing_ok=True)


def can_open_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    return True


def test_a_file_system_that_refuses_direct_reads_once_it_is_open_is_read_buffered(
    file, monkeypatch
):
    real = os.readv

    def readv(descriptor, buffers):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", readv)
    with running_reader() as reader:
        read(reader, [Segment(file, 5, 3 * CHUNK_BYTES, 0)], target := Target())
        target.holds(CONTENT[5 : 5 + 3 * CHUNK_BYTES], 0)
        assert reader.buffered_files == 1


def test_a_first_page_that_cannot_be_read_is_its_readers_failure(file, monkeypatch):
    def readv(_descriptor, _buffers):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "readv", readv)
    with running_reader() as reader:
        read(reader, [Segment(file, PAGE_BYTES, 100, 0)], target := Target())
        target.holds(CONTENT[PAGE_BYTES : PAGE_BYTES + 100], 0)
        assert reader.buffered_files == 0


@pytest.mark.parametrize("function", ["readv", "preadv"])
def test_no_surprise_ends_the_reader(file, monkeypatch, function):
    def surprise(*_):
        raise ValueError("This must not happen.")

    with running_reader() as reader:
        with monkeypatch.context() as patched:
            patched.setattr(os, function, surprise)
            with pytest.raises(MoeServerError, match="This must not happen"):
                read(reader, [Segment(file, 0, 100, 0)], Target())
        read(reader, [Segment(file, 0, 100, 0)], target := Target())
        target.holds(CONTENT[:100], 0)


def test_a_buffered_file_is_told_of(file, monkeypatch):
    with running_reader() as reader:
        read(reader, [Segment(file, 0, 1, 0)], Target())
        assert reader.buffered_files == 0
        refuse_direct(monkeypatch)
        other = file.with_name("other")
        other.write_bytes(CONTENT)
        read(reader, [Segment(other, 0, 1, 0)], Target())
        assert reader.buffered_files == 1
