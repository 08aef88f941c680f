"""The cache on a disk that does everything a disk can do wrong, in random mixtures, by seed.

Whatever happens, `check_integrity` holds after every step, what is yielded holds the right bytes,
and afterwards the cache serves as if nothing had been.
"""

import contextlib
import errno
import os
import random
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.cache import ExpertCache
from moe_server.offload.checksum import ChecksumBook, checksums
from moe_server.offload.cost import CostModel
from moe_server.offload.layout import PAGE_BYTES, ExpertId
from moe_server.offload.reader import Reader
from tests.offload.test_cache import (
    COPY,
    EXPERTS,
    FORGET,
    IN_PLACE,
    NUM_EXPERTS,
    NUM_LAYERS,
    STRIDE_BYTES,
    Shards,
)
from tests.offload.test_reader import WAIT_S

NUM_STEPS = 160
PRICES = {"copy": COPY, "in place": IN_PLACE, "forget": FORGET}
SAYINGS = ("Input/output error", "checksum", "it ends at byte", "No such file")


@dataclass
class Faults:
    """os.preadv, which fails at `rate` in one of many ways."""

    seed: int
    flips: bool
    rate: float = 0.0
    happened: dict[str, int] = field(default_factory=dict)

    def install(self, monkeypatch) -> "Faults":
        choose, lock, real = random.Random(self.seed), threading.Lock(), os.preadv
        kinds = ["eio", "short", "slow"] + ["flip"] * self.flips

        def preadv(descriptor, buffers, offset, *flags):
            with lock:
                kind = choose.choice(kinds) if choose.random() < self.rate else "none"
                self.happened[kind] = self.happened.get(kind, 0) + 1
                at = choose.random()
            if kind == "eio":
                raise OSError(errno.EIO, "Input/output error")
            if kind == "slow":
                time.sleep(0.001)
            count = real(descriptor, buffers, offset, *flags)
            [buffer] = buffers
            content = memoryview(buffer).cast("B")
            if kind == "flip" and count:
                content[int(at * min(count, len(content)))] ^= 1 << int(at * 8)
            if kind == "short":
                count -= count // 2 // PAGE_BYTES * PAGE_BYTES
            return count

        monkeypatch.setattr(os, "preadv", preadv)
        # A second attempt is as good at once as after a pause.
        monkeypatch.setattr("moe_server.offload.reader._RETRY_S", 0.0)
        return self


def make_book(shards: Shards) -> ChecksumBook:
    known = {}
    for segments, weights in zip(shards.records.values(), shards.weights.values(), strict=True):
        for segment, content in zip(segments, weights, strict=True):
            for index, found in enumerate(checksums(memoryview(content), PAGE_BYTES)):
                known[segment.file, segment.file_offset + index * PAGE_BYTES] = found
    return ChecksumBook(known, piece_bytes=PAGE_BYTES)


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Shards:
    monkeypatch.setattr("moe_server.offload.tiers._EXCHANGE_BYTES", 5000)
    return Shards(tmp_path)


def make_cache(shards, reader, sizes, prices, num_staging=0) -> ExpertCache:
    num_slots, num_records = sizes
    cache = ExpertCache(
        shards.records,
        num_layers=NUM_LAYERS,
        num_slots=num_slots,
        num_records=num_records,
        num_staging=num_staging,
        stride_bytes=STRIDE_BYTES,
        device="cuda" if num_staging else "cpu",
        reader=reader,
        cost=prices,
    )
    cache.tiers.cost.disk.observe(2**30, 1.0)
    return cache


@pytest.fixture
def pretend_gpu(monkeypatch) -> None:
    """Slots that reads cannot reach, in RAM: every read passes through a staging record."""

    def slots(count, stride_bytes, _device):
        return torch.empty(count, stride_bytes, dtype=torch.uint8)

    monkeypatch.setattr("moe_server.offload.tiers._gpu_slots", slots)
    monkeypatch.setattr("moe_server.offload.arena._register", lambda *_: None)


class Wishes:
    """A request that may leave at any time; what is not wanted is never wanted again."""

    def __init__(self, choose: random.Random, rate: float) -> None:
        self._choose, self._rate = choose, rate
        self.gone = set()

    def __call__(self, expert: int) -> bool:
        if self._choose.random() < self._rate:
            self.gone.add(expert)
        return expert not in self.gone


def disturb_files(shards: Shards, choose: random.Random) -> None:
    """Truncates, deletes or brings back."""
    file = choose.choice(shards.files)
    match choose.randrange(6):
        case 0:
            if file.exists():
                os.truncate(file, choose.randrange(file.stat().st_size + 1))
        case 1:
            file.unlink(missing_ok=True)
        case _:
            shards.restore()


@dataclass
class Seen:
    """What became of the experts that were asked for."""

    right: int = 0
    failed: int = 0
    dropped: int = 0
    stopped: int = 0


def one_layer(cache: ExpertCache, shards: Shards, choose: random.Random, seen: Seen) -> None:
    """Acquires some experts of a layer the way a step does, or a caller that loses interest."""
    layer = choose.randrange(NUM_LAYERS)
    experts = choose.sample(range(NUM_EXPERTS), choose.randint(1, NUM_EXPERTS))
    rows = [choose.randint(1, 64) for _ in experts]
    wishes = Wishes(choose, choose.choice([0.0, 0.0, 0.2]))
    if choose.random() < 0.6:
        cache.predict((layer + 1) % NUM_LAYERS, choose.sample(range(NUM_EXPERTS), 3))
    stop_after = choose.choice([None, None, None, choose.randint(0, len(experts))])
    groups = cache.acquire(layer, experts, rows, wishes)
    yielded = []
    for held in groups:
        yielded.append(held.expert)
        if not cache.tiers.cost.computes_in_place:
            assert held.slot is not None or held.dropped
        if stop_after is not None and len(yielded) > stop_after:
            for _ in range(choose.randint(0, 2)):
                next(held.arrivals, None)
            seen.stopped += 1
            break
        assert_arrives(held, layer, shards, wishes, seen)
    else:
        assert sorted(yielded) == sorted(experts), "each expert once"
    groups.close()


def assert_arrives(held, layer, shards, wishes, seen) -> None:
    arrived = list(held.arrivals)
    assert arrived == sorted(set(arrived)), "arrivals do not grow"
    if not held.dropped:
        # Twice: reads under way must not touch memory that is the caller's.
        for _ in range(2):
            shards.assert_in(held.memory, ExpertId(layer, held.expert))
        seen.right += 1
    elif held.error is not None:
        assert held.expert not in wishes.gone
        assert held.error.reason is Reason.UNAVAILABLE
        assert any(saying in held.error.message for saying in SAYINGS), held.error.message
        seen.failed += 1
    else:
        assert held.expert in wishes.gone
        seen.dropped += 1


def settle(cache: ExpertCache) -> None:
    """Waits for all that is under way, whatever becomes of it."""
    for fetch in (*cache._coming.values(), *cache._fetches.leaving):
        with contextlib.suppress(MoeServerError):
            fetch.ticket.wait(WAIT_S)
        assert fetch.ticket.done, "a read never ended: a thread is dead"


def assert_usable(cache: ExpertCache, shards: Shards, reader: Reader) -> None:
    assert all(thread.is_alive() for thread in reader._threads)
    settle(cache)
    for _ in range(2):
        for layer in range(NUM_LAYERS):
            held_of = {}
            for held in cache.acquire(layer, range(NUM_EXPERTS)):
                assert list(held.arrivals)
                assert held.error is None
                shards.assert_in(held.memory, ExpertId(layer, held.expert))
                held_of[held.expert] = held
            assert len(held_of) == NUM_EXPERTS
            cache.check_integrity()
    settle(cache)
    # Nothing is lost: with all reads settled, every place is taken or free, and none is leaving.
    for _ in cache.acquire(0, []):
        pass
    cache.check_integrity()
    assert not cache._coming
    assert not cache._fetches.leaving
    assert not cache._fetches.lack_staging
    assert len(cache._on_device.places) == min(cache.tiers._num_slots, len(EXPERTS))


SIZES = [(1, 0), (2, 3), (4, 1), (5, 4), (3, 7), (7, 1)]


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_mixture_of_faults(shards, monkeypatch, sizes, prices):
    seed = 10 * SIZES.index(sizes) + list(PRICES).index(prices)
    reader = Reader(3, PAGE_BYTES, make_book(shards))
    try:
        cache = make_cache(shards, reader, sizes, PRICES[prices])
        mistreat(cache, shards, reader, seed, monkeypatch)
    finally:
        reader.close()


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("num_staging", [1, 2, 4])
def test_any_mixture_of_faults_through_staging(
    shards, monkeypatch, pretend_gpu, num_staging, prices
):
    seed = 100 + 10 * num_staging + list(PRICES).index(prices)
    reader = Reader(3, PAGE_BYTES, make_book(shards))
    try:
        cache = make_cache(shards, reader, (4, 3), PRICES[prices], num_staging)
        mistreat(cache, shards, reader, seed, monkeypatch)
    finally:
        reader.close()


@pytest.mark.parametrize("sizes", [(1, 0), (1, 3), (2, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("num_staging", [1, 2])
def test_any_mixture_of_faults_where_all_is_computed_on_the_device(
    shards, monkeypatch, pretend_gpu, num_staging, sizes
):
    reader = Reader(3, PAGE_BYTES, make_book(shards))
    try:
        prices = CostModel(shared_memory=False, computes_in_place=False)
        cache = make_cache(shards, reader, sizes, prices, num_staging)
        mistreat(cache, shards, reader, 200 + 10 * num_staging + sum(sizes), monkeypatch)
    finally:
        reader.close()


def mistreat(cache, shards, reader, seed, monkeypatch) -> None:
    choose, seen = random.Random(seed), Seen()
    with monkeypatch.context() as patched:
        faults = Faults(seed, flips=True).install(patched)
        cache.fill(choose.sample(EXPERTS, 8))
        for number in range(NUM_STEPS):
            faults.rate = choose.choice([0.02, 0.3, 0.8])
            if number % 20 == 0:
                cache.fill(choose.sample(EXPERTS, 3))
            if choose.random() < 0.1:
                disturb_files(shards, choose)
            one_layer(cache, shards, choose, seen)
            cache.check_integrity()
        shards.restore()
    assert min(seen.right, seen.failed, seen.dropped, seen.stopped) > 0, seen
    assert all(faults.happened[kind] for kind in ("eio", "short", "slow", "flip"))
    assert reader.counters.retries
    assert reader.counters.mismatches
    assert_usable(cache, shards, reader)


def test_what_failed_ahead_of_the_need_is_read_again_when_it_is_needed(shards, monkeypatch):
    reader = Reader(2, PAGE_BYTES, make_book(shards))
    try:
        cache = make_cache(shards, reader, (4, 0), COPY)
        faults = Faults(0, flips=False).install(monkeypatch)
        faults.rate = 1.0
        monkeypatch.setattr(random.Random, "choice", lambda _self, _kinds: "eio")
        cache.fill([ExpertId(0, 1)])
        settle(cache)
        faults.rate = 0.0
        [held] = [held for held in cache.acquire(0, [1]) if list(held.arrivals)]
        assert held.error is None
        cache.check_integrity()
        assert on_device(cache) == {ExpertId(0, 1)}
    finally:
        reader.close()


def on_device(cache: ExpertCache) -> set[ExpertId]:
    return set(cache._on_device.places)
