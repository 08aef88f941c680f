"""What a killed process leaves in memory: whatever the table says is there is there, whole."""

import ctypes
import os
import random
import signal
import time

import pytest

from moe_server.offload.cache import ExpertCache
from moe_server.offload.lasting import LastingMemory, Ledger
from moe_server.offload.layout import ExpertId
from moe_server.offload.pages import HUGE_BYTES
from moe_server.offload.reader import Reader
from tests.offload.test_cache import (
    NUM_EXPERTS,
    NUM_LAYERS,
    PARTS,
    RECORD_BYTES,
    STRIDE_BYTES,
    Prices,
    Shards,
)

PLAN = {"num_slots": 4, "num_records": 3, "stride_bytes": STRIDE_BYTES}
KILLS = 25


@pytest.fixture
def descriptor():
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards(tmp_path)


def test_a_ledger_knows_what_was_entered_and_not_struck():
    ledger = Ledger.private(3)
    ledger.enter(0, ExpertId(0, 0))
    ledger.enter(2, ExpertId(31, 7))
    assert ledger.entries() == {0: ExpertId(0, 0), 2: ExpertId(31, 7)}
    ledger.strike(0)
    assert ledger.entries() == {2: ExpertId(31, 7)}


def test_the_next_one_finds_what_was_left(descriptor):
    first = LastingMemory(descriptor, "a model", **PLAN)
    assert not first.is_proven
    assert not first.slots_ledger.entries()
    first.slots_ledger.enter(3, ExpertId(1, 2))
    first.records_ledger.enter(0, ExpertId(2, 1))
    ctypes.memset(first.records.address, 9, 4)
    first.note_proven(2**21, 4)
    second = LastingMemory(descriptor, "a model", **PLAN)
    assert second.slots_ledger.entries() == {3: ExpertId(1, 2)}
    assert second.records_ledger.entries() == {0: ExpertId(2, 1)}
    assert ctypes.string_at(second.records.address, 5) == b"\x09\x09\x09\x09\x00"
    assert second.is_proven


@pytest.mark.parametrize(
    ("bound_to", "changes"),
    [
        ("another model", {}),
        ("a model", {"num_slots": 5}),
        ("a model", {"num_records": 2}),
        ("a model", {"stride_bytes": 2 * STRIDE_BYTES}),
    ],
)
def test_nothing_is_kept_for_another_model_or_plan(descriptor, bound_to, changes):
    first = LastingMemory(descriptor, "a model", **PLAN)
    first.slots_ledger.enter(0, ExpertId(0, 1))
    first.note_proven(2**21, 4)
    ctypes.memset(first.slots.address, 9, 4)
    other = LastingMemory(descriptor, bound_to, **{**PLAN, **changes})
    assert not other.slots_ledger.entries()
    assert not other.is_proven
    assert ctypes.string_at(other.slots.address, 4) == bytes(4)


def test_a_file_that_is_not_ours_or_cut_short_is_begun_anew(descriptor):
    os.write(descriptor, random.Random(0).randbytes(4 * HUGE_BYTES))
    assert not LastingMemory(descriptor, "a model", **PLAN).slots_ledger.entries()
    LastingMemory(descriptor, "a model", **PLAN).slots_ledger.enter(0, ExpertId(0, 1))
    os.ftruncate(descriptor, HUGE_BYTES)
    assert not LastingMemory(descriptor, "a model", **PLAN).slots_ledger.entries()


def cache_over(shards: Shards, memory: LastingMemory, reader: Reader, choose) -> ExpertCache:
    return ExpertCache(
        shards.records,
        num_layers=NUM_LAYERS,
        num_staging=0,
        device="cpu",
        reader=reader,
        # All ways that an expert can take: read, promoted into a free slot, exchanged, demoted.
        cost=Prices(copy=choose.random() < 0.7, demote=choose.random() < 0.7),
        lasting=memory,
        **PLAN,
    )


def work_until_killed(shards: Shards, descriptor: int, seed: int, started: int) -> None:
    choose = random.Random(seed)
    reader = Reader(2, 4096)
    cache = cache_over(shards, LastingMemory(descriptor, "x", **PLAN), reader, choose)
    cache.tiers.adopt(lambda expert, address: True)
    os.write(started, b"!")
    while True:
        layer = choose.randrange(NUM_LAYERS)
        experts = choose.sample(range(NUM_EXPERTS), choose.randint(1, 4))
        cache.predict((layer + 1) % NUM_LAYERS, choose.sample(range(NUM_EXPERTS), 2))
        for held in cache.acquire(layer, experts):
            for _ in held.arrivals:
                pass
            if choose.random() < 0.1:
                break


def test_wherever_a_process_is_killed_its_table_tells_the_truth(descriptor, shards):
    """Process after process works on the same memory and is killed at any moment."""
    choose = random.Random(1)
    num_entries = 0
    for seed in range(KILLS):
        started_reading, started_writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work_until_killed(shards, descriptor, seed, started_writing)
            finally:
                os._exit(1)
        assert os.read(started_reading, 1) == b"!"
        time.sleep(choose.uniform(0, 0.02))  # not to wait for anything: to vary the moment
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        os.close(started_reading)
        os.close(started_writing)
        memory = LastingMemory(descriptor, "x", **PLAN)
        entries = [
            (expert, arena.address + place * STRIDE_BYTES)
            for ledger, arena in (
                (memory.slots_ledger, memory.slots),
                (memory.records_ledger, memory.records),
            )
            for place, expert in ledger.entries().items()
        ]
        assert len({expert for expert, _ in entries}) == len(entries), "an expert in two places"
        for expert, address in entries:
            record = ctypes.string_at(address, RECORD_BYTES + 64)
            for (offset, nbytes), weights in zip(PARTS, shards.weights[expert], strict=True):
                assert record[offset : offset + nbytes] == weights, f"{expert} is not whole"
        num_entries += len(entries)
    assert num_entries > 3 * KILLS


def test_what_is_not_intact_or_there_twice_is_not_taken_over(descriptor, shards):
    memory = LastingMemory(descriptor, "x", **PLAN)
    memory.slots_ledger.enter(0, ExpertId(0, 1))
    memory.slots_ledger.enter(2, ExpertId(0, 2))
    memory.records_ledger.enter(1, ExpertId(0, 1))
    reader = Reader(1, 4096)
    cache = cache_over(shards, memory, reader, random.Random(0))
    assert cache.tiers.adopt(lambda expert, address: expert != ExpertId(0, 2)) == 1
    cache.check_integrity()
    assert memory.slots_ledger.entries() == {0: ExpertId(0, 1)}
    assert not memory.records_ledger.entries()
    reader.close()
