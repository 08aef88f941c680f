"""The cache against files whose bytes the test knows: whatever it yields must hold those bytes."""

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.cache import ExpertCache
from moe_server.offload.layout import PAGE_BYTES, ExpertId, Segment
from moe_server.offload.reader import Reader

NUM_LAYERS, NUM_EXPERTS = 3, 5
TOTAL = NUM_LAYERS * NUM_EXPERTS
STRIDE_BYTES = 3 * PAGE_BYTES
PARTS = ((0, 4001), (4001, 4001), (8064, 4000))
"""(offset in the record, bytes) of its three segments: nothing is aligned."""
RECORD_BYTES = sum(nbytes for _, nbytes in PARTS)
EXPERTS = [ExpertId(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


@dataclass
class Shards:
    """Expert weights in two files, in no order."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    records: dict[ExpertId, tuple[Segment, ...]] = field(default_factory=dict)
    weights: dict[ExpertId, list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose = random.Random(0)
        self.files = [self.folder / "shard-0", self.folder / "shard-1"]
        contents = [bytearray(b"header"), bytearray(b"another header")]
        for expert in choose.sample(EXPERTS, TOTAL):
            segments = []
            self.weights[expert] = []
            for offset, nbytes in PARTS:
                number = choose.randrange(2)
                weights = choose.randbytes(nbytes)
                start = len(contents[number])
                segments.append(Segment(self.files[number], start, nbytes, offset))
                self.weights[expert].append(weights)
                contents[number] += weights
            self.records[expert] = tuple(segments)
        self.contents = [bytes(content) for content in contents]
        self.restore()

    def restore(self) -> None:
        for file, content in zip(self.files, self.contents, strict=True):
            # In place: who has the file open sees it whole again.
            with file.open("r+b" if file.exists() else "wb") as stream:
                stream.write(content)

    def assert_in(self, slot: torch.Tensor, expert: ExpertId) -> None:
        record = slot.numpy().tobytes()
        for (offset, nbytes), weights in zip(PARTS, self.weights[expert], strict=True):
            assert record[offset : offset + nbytes] == weights, f"slot does not hold {expert}"


class Tickets(Reader):
    """A reader that remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(2, PAGE_BYTES)
        self.submitted = []

    def submit(self, segments, address):
        ticket = super().submit(segments, address)
        self.submitted.append((segments, ticket))
        return ticket


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Experts change places in more than one piece, the last one shorter."""
    monkeypatch.setattr("moe_server.offload.cache._EXCHANGE_BYTES", 5000)


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards(tmp_path)


@pytest.fixture
def reader():
    reader = Tickets()
    yield reader
    reader.close()


def make_cache(shards: Shards, reader: Reader, num_slots: int, num_records: int) -> ExpertCache:
    return ExpertCache(
        shards.records,
        num_layers=NUM_LAYERS,
        num_slots=num_slots,
        num_records=num_records,
        num_staging=0,
        stride_bytes=STRIDE_BYTES,
        device=torch.device("cpu"),
        reader=reader,
    )


def on_device(cache: ExpertCache) -> set[ExpertId]:
    return set(cache._on_device.places)


def in_host(cache: ExpertCache) -> set[ExpertId]:
    return set(cache._in_host.places)


def tell(cache: ExpertCache) -> tuple[int, ...]:
    counters = cache.counters
    return (
        counters.device_hits,
        counters.host_hits,
        counters.disk_reads,
        counters.transfer_bytes,
        counters.read_bytes,
    )


def acquire(cache: ExpertCache, shards: Shards, layer: int, experts: list[int]) -> None:
    """Acquires all and holds the cache to its contract on the way."""
    wanted = {ExpertId(layer, expert) for expert in experts}
    hits = wanted & on_device(cache)
    host_hits = wanted & in_host(cache)
    misses = len(wanted) - len(hits) - len(host_hits)
    before = tell(cache)
    yielded = []
    for number, group in enumerate(cache.acquire(layer, experts)):
        assert group
        numbers = [expert for expert, _ in group]
        if hits and number == 0:
            assert {ExpertId(layer, expert) for expert in numbers} == hits
        yielded += numbers
        assert len({slot for _, slot in group}) == len(group), "two experts in one slot"
        # Twice: reads under way must not touch slots that are the caller's.
        for _ in range(2):
            for expert, slot in group:
                shards.assert_in(cache.slot(slot), ExpertId(layer, expert))
    assert sorted(yielded) == sorted(experts), "each expert once"
    cache.check_integrity()
    expected = (
        len(hits),
        len(host_hits),
        misses,
        len(host_hits) * STRIDE_BYTES,
        misses * RECORD_BYTES,
    )
    assert tuple(now - then for now, then in zip(tell(cache), before, strict=True)) == expected


def some_experts(choose: random.Random) -> tuple[int, list[int]]:
    return choose.randrange(NUM_LAYERS), choose.sample(
        range(NUM_EXPERTS), choose.randint(1, NUM_EXPERTS)
    )


SIZES = [(1, 0), (1, 1), (2, 0), (2, 3), (4, 1), (5, 4), (7, 8), (14, 1), (15, 0), (3, 12)]


@pytest.mark.parametrize(("num_slots", "num_records"), SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_every_slot_holds_its_expert_when_it_is_yielded(
    shards, reader, num_slots, num_records, seed
):
    cache = make_cache(shards, reader, num_slots, num_records)
    choose = random.Random(seed)
    for _ in range(60):
        acquire(cache, shards, *some_experts(choose))
        device, host = cache.resident_bytes()
        assert device == len(on_device(cache)) * STRIDE_BYTES
        assert host == len(in_host(cache)) * STRIDE_BYTES
        for expert, place in cache._in_host.places.items():
            shards.assert_in(cache._host[place], expert)
    # Full: nothing is evicted before there is need.
    assert len(on_device(cache)) == num_slots


@pytest.mark.parametrize(("num_slots", "num_records"), [(1, 14), (2, 13), (5, 10), (14, 1)])
def test_tiers_that_hold_all_experts_together_read_each_once(
    shards, reader, num_slots, num_records
):
    cache = make_cache(shards, reader, num_slots, num_records)
    choose = random.Random(1)
    for layer in range(NUM_LAYERS):
        acquire(cache, shards, layer, list(range(NUM_EXPERTS)))
    for _ in range(60):
        acquire(cache, shards, *some_experts(choose))
    assert cache.counters.disk_reads == TOTAL


@pytest.mark.parametrize("seed", range(6))
def test_a_caller_may_stop_anywhere(shards, reader, seed):
    choose = random.Random(seed)
    cache = make_cache(shards, reader, choose.randint(1, 6), choose.choice([0, 2, 5]))
    for _ in range(80):
        layer, experts = some_experts(choose)
        groups = cache.acquire(layer, experts)
        for _ in range(choose.randint(0, len(experts))):
            for expert, slot in next(groups, []):
                shards.assert_in(cache.slot(slot), ExpertId(layer, expert))
        groups.close()
        cache.check_integrity()
    for _ in range(20):
        acquire(cache, shards, *some_experts(choose))


def test_stopping_keeps_what_had_arrived(shards, reader):
    cache = make_cache(shards, reader, num_slots=3, num_records=0)
    groups = cache.acquire(0, [0, 1, 2])
    next(groups)
    for _, ticket in reader.submitted:
        ticket.wait()
    groups.close()
    cache.check_integrity()
    assert on_device(cache) == {ExpertId(0, expert) for expert in range(3)}
    acquire(cache, shards, 0, [0, 1, 2])
    assert cache.counters.disk_reads == 3


def test_misses_are_being_read_while_hits_are_computed(shards, reader):
    cache = make_cache(shards, reader, num_slots=3, num_records=0)
    acquire(cache, shards, 0, [0])
    groups = cache.acquire(0, [1, 0, 2])
    assert [expert for expert, _ in next(groups)] == [0]
    assert [segments for segments, _ in reader.submitted[1:]] == [
        shards.records[ExpertId(0, 1)],
        shards.records[ExpertId(0, 2)],
    ]
    groups.close()


def fail_reads(monkeypatch, choose: random.Random, rate: float) -> list[float]:
    """Lets reads fail at the rate in the list that it returns."""
    real, rates = os.preadv, [rate]

    def preadv(*args):
        if choose.random() < rates[0]:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    return rates


@pytest.mark.parametrize("seed", range(6))
def test_failed_reads_raise_and_leave_the_cache_whole(shards, reader, seed, monkeypatch):
    choose = random.Random(seed)
    cache = make_cache(shards, reader, choose.randint(1, 6), choose.choice([0, 2, 5]))
    rates = fail_reads(monkeypatch, choose, 0.05)
    failures = 0
    for _ in range(80):
        layer, experts = some_experts(choose)
        yielded = []
        try:
            for group in cache.acquire(layer, experts):
                for expert, slot in group:
                    shards.assert_in(cache.slot(slot), ExpertId(layer, expert))
                    yielded.append(expert)
        except MoeServerError as error:
            failures += 1
            assert error.reason is Reason.UNAVAILABLE
            assert "Input/output error" in error.message
        else:
            assert sorted(yielded) == sorted(experts)
        cache.check_integrity()
    assert failures > 5
    rates[0] = 0.0
    for _ in range(20):
        acquire(cache, shards, *some_experts(choose))


@pytest.mark.parametrize("damage", ["truncated", "deleted before it was opened"])
def test_experts_are_served_again_once_the_file_is_back(shards, reader, damage):
    cache = make_cache(shards, reader, num_slots=2, num_records=1)
    if damage == "truncated":
        acquire(cache, shards, 0, [0, 1, 2])
        for file in shards.files:
            os.truncate(file, 10)
    else:
        for file in shards.files:
            file.unlink()
    with pytest.raises(MoeServerError, match="shard-") as caught:
        list(cache.acquire(1, [0, 1, 2, 3, 4]))
    assert caught.value.reason is Reason.UNAVAILABLE
    cache.check_integrity()
    shards.restore()
    for layer in range(NUM_LAYERS):
        acquire(cache, shards, layer, list(range(NUM_EXPERTS)))


def test_what_is_resident_needs_no_disk(shards, reader):
    cache = make_cache(shards, reader, num_slots=2, num_records=2)
    acquire(cache, shards, 0, [0, 1, 2, 3])
    for file in shards.files:
        os.truncate(file, 0)
    for _ in range(3):
        acquire(cache, shards, 0, [3, 1, 0, 2])
