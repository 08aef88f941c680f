"""The cache against files whose bytes the test knows: whatever it yields must hold those bytes."""

import errno
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.cache import ExpertCache
from moe_server.offload.cost import CostModel, Speed
from moe_server.offload.layout import PAGE_BYTES, ExpertId, Segment
from moe_server.offload.reader import Priority, Reader
from tests.offload.test_reader import Gate

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

    def submit(self, *args, **kwargs):
        ticket = super().submit(*args, **kwargs)
        self.submitted.append((args[0], ticket))
        return ticket


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Experts change places in more than one piece, the last one shorter."""
    monkeypatch.setattr("moe_server.offload.tiers._EXCHANGE_BYTES", 5000)


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards(tmp_path)


@pytest.fixture
def reader():
    reader = Tickets()
    yield reader
    reader.close()


class Prices(CostModel):
    """A cost model whose answers the test gives."""

    def __init__(self, *, copy: bool, demote: bool) -> None:
        super().__init__(shared_memory=False)
        self.answers = (copy, demote)

    def copy_pays(self, rows, nbytes):
        return self.answers[0]

    def demotion_pays(self, nbytes):
        return self.answers[1]


class Constant(Speed):
    """A speed that nothing observed changes."""

    def observe(self, nbytes, seconds):
        pass


COPY, IN_PLACE = Prices(copy=True, demote=True), Prices(copy=False, demote=True)
FORGET = Prices(copy=False, demote=False)


def make_cache(
    shards: Shards, reader: Reader, num_slots: int, num_records: int, prices: CostModel = COPY
) -> ExpertCache:
    return ExpertCache(
        shards.records,
        num_layers=NUM_LAYERS,
        num_slots=num_slots,
        num_records=num_records,
        num_staging=0,
        stride_bytes=STRIDE_BYTES,
        device="cpu",
        reader=reader,
        cost=prices,
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
        cache.tiers.counters.transfer_bytes,
    )


def acquire(cache: ExpertCache, shards: Shards, layer: int, experts: list[int]) -> None:
    """Acquires all and holds the cache to its contract on the way."""
    wanted = {ExpertId(layer, expert) for expert in experts}
    hits = wanted & on_device(cache)
    host_hits = wanted & in_host(cache)
    misses = len(wanted) - len(hits) - len(host_hits)
    before, copied = tell(cache), cache.tiers.cost.copied
    yielded = []
    for held in cache.acquire(layer, experts):
        arrived = list(held.arrivals)
        if held.error is not None:
            raise held.error
        assert arrived == sorted(set(arrived)), "arrivals do not grow"
        yielded.append(held.expert)
        # Twice: reads under way must not touch slots that are the caller's.
        for _ in range(2):
            shards.assert_in(held.memory, ExpertId(layer, held.expert))
    assert {ExpertId(layer, expert) for expert in yielded[: len(hits)]} == hits
    assert sorted(yielded) == sorted(experts), "each expert once"
    cache.check_integrity()
    moved = (cache.tiers.cost.copied - copied) * STRIDE_BYTES
    expected = (len(hits), len(host_hits), misses, moved)
    assert tuple(now - then for now, then in zip(tell(cache), before, strict=True)) == expected


def some_experts(choose: random.Random) -> tuple[int, list[int]]:
    return choose.randrange(NUM_LAYERS), choose.sample(
        range(NUM_EXPERTS), choose.randint(1, NUM_EXPERTS)
    )


SIZES = [(1, 0), (1, 1), (2, 0), (2, 3), (4, 1), (5, 4), (7, 8), (14, 1), (15, 0), (3, 12)]


@pytest.mark.parametrize(("num_slots", "num_records"), SIZES)
@pytest.mark.parametrize("prices", [COPY, IN_PLACE, FORGET], ids=["copy", "in place", "forget"])
def test_every_slot_holds_its_expert_when_it_is_yielded(
    shards, reader, num_slots, num_records, prices
):
    cache = make_cache(shards, reader, num_slots, num_records, prices)
    choose = random.Random(num_slots)
    for _ in range(60):
        acquire(cache, shards, *some_experts(choose))
        for expert, place in cache._in_host.places.items():
            shards.assert_in(cache.tiers.host[place], expert)
    # Full: nothing is evicted before there is need.
    assert len(on_device(cache)) == num_slots
    assert cache.counters.read_bytes == cache.counters.disk_reads * RECORD_BYTES


@pytest.mark.parametrize(("num_slots", "num_records"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_predictions_right_or_wrong_change_no_result(shards, reader, num_slots, num_records, seed):
    prices = (COPY, IN_PLACE, FORGET)[seed]
    cache = make_cache(shards, reader, num_slots, num_records, prices)
    cache.tiers.cost.disk.observe(2**30, 1.0)
    choose = random.Random(seed)
    for number in range(150):
        layer = number % NUM_LAYERS
        experts = choose.sample(range(NUM_EXPERTS), choose.randint(1, NUM_EXPERTS))
        wanted = {ExpertId(layer, expert) for expert in experts}
        cache.predict((layer + 1) % NUM_LAYERS, choose.sample(range(NUM_EXPERTS), 3))
        yielded = []
        for held in cache.acquire(layer, experts):
            for _ in held.arrivals:
                pass
            for _ in range(2):
                shards.assert_in(held.memory, ExpertId(layer, held.expert))
            yielded.append(ExpertId(layer, held.expert))
        assert sorted(yielded) == sorted(wanted)
        cache.check_integrity()
    counters = cache.counters
    assert counters.device_hits + counters.host_hits + counters.disk_reads > 0
    if num_slots in range(3, 15):
        assert counters.prefetches > counters.prefetch_hits > 0


def test_what_was_predicted_is_on_its_way_before_it_is_wanted(shards, reader):
    cache = make_cache(shards, reader, num_slots=4, num_records=0)
    cache.predict(1, [3])
    acquire(cache, shards, 0, [0])
    segments, ticket = reader.submitted[-1]
    assert segments == shards.records[ExpertId(1, 3)]
    assert ticket.priority is Priority.PREFETCH
    groups = cache.acquire(1, [3])
    held = next(groups)
    assert ticket.priority is Priority.DEMAND
    assert list(held.arrivals)
    shards.assert_in(held.memory, ExpertId(1, 3))
    assert len(reader.submitted) == 2
    assert cache.counters.prefetch_hits == 1


def test_a_wrong_prediction_leaves_its_place(shards, reader, monkeypatch):
    cache = make_cache(shards, reader, num_slots=2, num_records=0)
    acquire(cache, shards, 0, [0])
    gate = Gate(monkeypatch)
    cache.predict(1, [3])
    for held in cache.acquire(0, [0]):
        shards.assert_in(held.memory, ExpertId(0, 0))
    gate.await_call()
    [_, (_, wrong)] = reader.submitted

    def cancel():
        reader.drop(wrong)
        gate.opened.set()

    monkeypatch.setattr(wrong, "cancel", cancel)
    acquire(cache, shards, 1, [2])
    assert wrong.done
    assert not wrong.complete
    assert cache.counters.cancelled == 1
    assert cache.counters.read_bytes < 3 * RECORD_BYTES


def test_a_preload_that_failed_with_a_block_still_on_its_way_is_read_anew(
    shards, reader, monkeypatch
):
    cache = make_cache(shards, reader, num_slots=2, num_records=0)
    wanted = ExpertId(0, 1)
    first = next(segment for segment in shards.records[wanted] if segment.record_offset == 0)
    first_page = first.file_offset // PAGE_BYTES * PAGE_BYTES
    real, opened, is_bad = os.preadv, threading.Event(), True

    def preadv(descriptor, buffers, offset, *flags):
        is_first = first.file.stat().st_ino == os.fstat(descriptor).st_ino
        if is_bad and is_first and offset == first_page:
            raise OSError(errno.EIO, "Input/output error")
        if is_bad:
            assert opened.wait(5)
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    cache.fill([wanted])
    [(_, failed)] = reader.submitted
    while failed.error is None:
        time.sleep(0.001)
    assert not failed.done, "the test needs a block that is still being read"
    is_bad = False
    opened.set()
    acquire(cache, shards, 0, [1])
    cache.check_integrity()


def test_closing_waits_for_no_prediction(shards, reader, monkeypatch):
    cache = make_cache(shards, reader, num_slots=2, num_records=0)
    acquire(cache, shards, 0, [0])
    gate = Gate(monkeypatch)
    cache.predict(1, [3])
    for _ in cache.acquire(0, [0]):
        gate.await_call()
    [_, (_, predicted)] = reader.submitted
    cache.close()
    gate.opened.set()
    reader.close()
    assert predicted.done
    assert predicted.read_bytes < RECORD_BYTES


def test_a_prediction_never_takes_a_place_that_is_needed_sooner(shards, reader):
    cache = make_cache(shards, reader, num_slots=3, num_records=0)
    acquire(cache, shards, 0, [0, 1])
    acquire(cache, shards, 1, [0])
    cache.predict(1, [0, 1])
    groups = cache.acquire(0, [0, 1])
    next(groups)
    # Both experts of layer 0 are in use and the one of layer 1 is predicted itself.
    assert len(reader.submitted) == 3
    groups.close()


@pytest.mark.parametrize(("num_slots", "num_records"), [(1, 0), (3, 4), (6, 2), (15, 0), (2, 13)])
def test_filling_brings_what_has_a_place_and_hinders_nobody(shards, reader, num_slots, num_records):
    cache = make_cache(shards, reader, num_slots, num_records, IN_PLACE)
    cache.fill(EXPERTS)
    cache.check_integrity()
    choose = random.Random(0)
    for _ in range(5):
        layer, experts = some_experts(choose)
        for held in cache.acquire(layer, experts):
            assert list(held.arrivals)
            shards.assert_in(held.memory, ExpertId(layer, held.expert))
        cache.check_integrity()
    seen = []
    cache.wait_filled(seen.append)
    cache.check_integrity()
    assert seen == sorted(seen)
    assert not cache._coming
    for _ in range(20):
        acquire(cache, shards, *some_experts(choose))


def test_filled_experts_are_there(shards, reader):
    cache = make_cache(shards, reader, 4, 3, IN_PLACE)
    cache.fill(EXPERTS)
    cache.wait_filled(lambda _: None)
    assert on_device(cache) | in_host(cache) == set(EXPERTS[:7])
    assert len(reader.submitted) == 7


def test_a_read_that_nobody_wants_any_more_leaves_the_queue(shards, reader, monkeypatch):
    cache = make_cache(shards, reader, num_slots=5, num_records=0)
    acquire(cache, shards, 0, [0])
    gate = Gate(monkeypatch)
    asked = []

    def still_wanted(expert):
        asked.append(expert)
        if len(asked) > 3:
            gate.opened.set()
        return expert != 2

    held_of = {}
    for held in cache.acquire(0, [0, 2, 3], None, still_wanted):
        assert list(held.arrivals) or held.dropped
        held_of[held.expert] = held
        if not held.dropped:
            shards.assert_in(held.memory, ExpertId(0, held.expert))
    assert held_of[2].dropped
    assert not held_of[3].dropped
    [_, (_, dropped), (_, wanted)] = reader.submitted
    assert wanted.complete
    assert not dropped.complete
    cache.check_integrity()
    acquire(cache, shards, 0, [0, 2, 3])


FAST = Constant(1e15)
"""The speed of a disk that runs out of work at once: the next read begins before the last ends."""


def test_a_read_leaves_the_queue_while_another_is_waited_for(shards, reader, monkeypatch):
    prices = CostModel(shared_memory=True, disk=FAST)
    cache = make_cache(shards, reader, num_slots=5, num_records=0, prices=prices)
    gate, asked = Gate(monkeypatch), []

    def still_wanted(expert):
        asked.append(expert)
        if asked.count(1) == 2:
            [_, (_, left)] = reader.submitted
            assert left.done
            gate.opened.set()
        return expert != 2

    dropped = []
    for held in cache.acquire(0, [1, 2], None, still_wanted):
        assert list(held.arrivals) or held.dropped
        dropped.append(held.dropped)
    assert dropped == [False, True]
    cache.check_integrity()


@pytest.mark.parametrize(("num_slots", "num_records"), [(1, 14), (2, 13), (5, 10), (14, 1)])
@pytest.mark.parametrize("prices", [COPY, IN_PLACE], ids=["copy", "in place"])
def test_tiers_that_hold_all_experts_together_read_each_once(
    shards, reader, num_slots, num_records, prices
):
    cache = make_cache(shards, reader, num_slots, num_records, prices)
    choose = random.Random(1)
    for layer in range(NUM_LAYERS):
        acquire(cache, shards, layer, list(range(NUM_EXPERTS)))
    for _ in range(60):
        acquire(cache, shards, *some_experts(choose))
    assert cache.counters.disk_reads == TOTAL


def test_a_scan_that_used_nothing_twice_does_not_end_demotion_for_good(shards, reader):
    prices = CostModel(shared_memory=True, disk=Constant(2e9), copy=Constant(5e9))
    cache = make_cache(shards, reader, num_slots=3, num_records=3, prices=prices)
    for _ in range(6):
        for expert in EXPERTS:
            acquire(cache, shards, expert.layer, [expert.expert])
    assert not prices.demotion_pays(STRIDE_BYTES)
    # From now on six others are wanted, as many as both tiers hold together.
    frozen = in_host(cache)
    for number in range(100):
        if number == 20:
            before = cache.counters.disk_reads
        for layer in range(NUM_LAYERS):
            absent = [one for one in range(NUM_EXPERTS) if ExpertId(layer, one) not in frozen]
            acquire(cache, shards, layer, absent[:2])
    assert cache.counters.disk_reads == before


@pytest.mark.parametrize("seed", range(6))
def test_a_caller_may_stop_anywhere(shards, reader, seed):
    choose = random.Random(seed)
    cache = make_cache(shards, reader, choose.randint(1, 6), choose.choice([0, 2, 5]))
    for _ in range(80):
        layer, experts = some_experts(choose)
        groups = cache.acquire(layer, experts)
        for _ in range(choose.randint(0, len(experts))):
            held = next(groups)
            for _ in range(choose.randint(0, 4)):
                next(held.arrivals, None)
        groups.close()
        cache.check_integrity()
    for _ in range(20):
        acquire(cache, shards, *some_experts(choose))


def test_stopping_keeps_what_had_arrived(shards, reader):
    cache = make_cache(shards, reader, num_slots=3, num_records=0)
    groups = cache.acquire(0, [0, 1])
    next(groups)
    assert len(reader.submitted) == 2
    for _, ticket in reader.submitted:
        ticket.wait()
    groups.close()
    cache.check_integrity()
    assert on_device(cache) == {ExpertId(0, expert) for expert in range(2)}
    acquire(cache, shards, 0, [0, 1])
    assert cache.counters.disk_reads == 2


def test_misses_are_being_read_while_hits_are_computed(shards, reader):
    cache = make_cache(shards, reader, num_slots=3, num_records=0)
    acquire(cache, shards, 0, [0])
    groups = cache.acquire(0, [1, 0, 2])
    assert next(groups).expert == 0
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
def test_failed_reads_are_told_and_leave_the_cache_whole(shards, reader, seed, monkeypatch):
    choose = random.Random(seed)
    cache = make_cache(shards, reader, choose.randint(1, 6), choose.choice([0, 2, 5]))
    rates = fail_reads(monkeypatch, choose, 0.35)
    failures = 0
    for _ in range(80):
        layer, experts = some_experts(choose)
        yielded = []
        for held in cache.acquire(layer, experts):
            for _ in held.arrivals:
                pass
            yielded.append(held.expert)
            if held.error is None:
                shards.assert_in(held.memory, ExpertId(layer, held.expert))
            else:
                failures += 1
                assert held.dropped
                assert held.error.reason is Reason.UNAVAILABLE
                assert "Input/output error" in held.error.message
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
        acquire(cache, shards, 1, [0, 1, 2, 3, 4])
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
