"""An engine that comes after another finds its experts in memory, and gives the same tokens."""

import ctypes
import os
import shutil
from dataclasses import replace

import pytest

from moe_server.kernels.formats import WeightFormat
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from tests.driver import greedy, run, running_engine, token_ids
from tests.test_faults import NEW_TOKENS, PROMPTS, TINY, undisturbed

SOME = {"device_memory": "min", "host_memory": 300_000, "max_total_tokens": 256}
"""Places in both tiers, and experts that have none."""


@pytest.fixture
def memory():
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def path(tmp_path):
    return TINY.write(tmp_path / "source")


@pytest.fixture
def store(path, tmp_path):
    int4 = StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 32)
    pack(path, tmp_path / "store", int4, assess=lambda _store, _rounding: {})
    return tmp_path / "store"


def answers(engine) -> list[list[int]]:
    return [token_ids(events) for events in run(engine, greedy(PROMPTS, NEW_TOKENS))]


def test_the_second_engine_reads_no_expert(path, memory):
    expected = undisturbed(path)
    with running_engine(path, memory, **SOME) as engine:
        assert engine.weights.num_kept == 0
        # Every expert was read, also those that have no place.
        checkpoint = engine.model.checkpoint
        every = sum(
            part.nbytes
            for expert in checkpoint.experts
            for part in checkpoint.record_segments(expert)
        )
        assert engine.cache.counters.read_bytes >= every
        assert answers(engine) == expected
        places = (engine.cache.tiers.on_device.places, engine.cache.tiers.in_host.places)
        near = [dict(tier) for tier in places]
        assert all(near)
        assert sum(map(len, near)) < TINY.layers * TINY.experts
    with running_engine(path, memory, **SOME) as engine:
        engine.cache.check_integrity()
        assert engine.weights.num_kept == sum(map(len, near))
        assert engine.cache.counters.read_bytes == 0
        now = {*engine.cache.tiers.on_device.places, *engine.cache.tiers.in_host.places}
        assert now == {*near[0], *near[1]}
        assert answers(engine) == expected


def test_memory_that_would_be_slow_now_is_given_back(path, memory, monkeypatch):
    with running_engine(path, memory, **SOME):
        pass
    assert os.fstat(memory).st_blocks
    monkeypatch.setattr("moe_server.weights.is_as_fast_as_private", lambda: False)
    with running_engine(path, memory, **SOME) as engine:
        assert engine.weights.num_kept == 0
        assert not os.fstat(memory).st_blocks
        assert answers(engine) == undisturbed(path)


def test_reading_goes_on_as_suited_the_disk(path, memory):
    with running_engine(path, memory, **SOME) as engine:
        engine.weights.reader.block_bytes, engine.weights.reader.depth = 4 * 2**20, 2
        engine.weights.note_proven()
    with running_engine(path, memory, **SOME) as engine:
        reader = engine.weights.reader
        assert (reader.block_bytes, reader.depth) == (4 * 2**20, 2)


def test_a_checkpoint_that_was_replaced_is_read_anew(path, memory, tmp_path):
    with running_engine(path, memory):
        pass
    other = replace(TINY, seed=41).write(tmp_path / "other")
    for file in other.iterdir():
        shutil.copy(file, path / file.name)
    with running_engine(path, memory) as engine:
        assert engine.weights.num_kept == 0
        assert answers(engine) == undisturbed(other)


def test_a_byte_that_changed_in_memory_is_found_where_checksums_are_known(store, memory):
    with running_engine(store, memory) as engine:
        expected = answers(engine)
        [(expert, slot), *_] = engine.cache.tiers.on_device.places.items()
        address = engine.cache.tiers.slots.address(slot)
        ctypes.memset(address + 100, ctypes.string_at(address + 100, 1)[0] ^ 1, 1)
    with running_engine(store, memory) as engine:
        assert engine.weights.num_kept == TINY.layers * TINY.experts - 1
        assert engine.cache.counters.read_bytes == sum(
            part.nbytes for part in engine.model.checkpoint.record_segments(expert)
        )
        assert answers(engine) == expected
