"""Refilling a live cache: against brute force, with and without traffic beside it."""

import errno
import os
import random
import threading

import pytest

from moe_server.offload.layout import ExpertId
from moe_server.offload.refill import Refill
from moe_server.offload.uses import Uses
from tests.offload.test_cache import (
    COPY,
    NUM_EXPERTS,
    NUM_LAYERS,
    STRIDE_BYTES,
    TOTAL,
    Shards,
    Tickets,
    acquire,
    in_host,
    make_cache,
    on_device,
)


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards(tmp_path)


@pytest.fixture
def reader():
    reader = Tickets()
    yield reader
    reader.close()


def random_cache(shards, reader, choose: random.Random):
    """Of some slots and perhaps records; returns how many places there are, too."""
    places = choose.randint(2, TOTAL)
    records = choose.choice([0, choose.randint(0, places - 1)])
    return make_cache(shards, reader, places - records, records, COPY), places


def random_uses(choose: random.Random) -> Uses:
    """Shares among which some are equal."""
    uses = Uses(NUM_LAYERS, NUM_EXPERTS)
    levels = [choose.random() for _ in range(choose.choice([1, 3, 100]))]
    shares = [[choose.choice(levels) for _ in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
    uses.restore([100.0] * NUM_LAYERS, shares)
    return uses


def warm(cache, shards, choose: random.Random) -> None:
    for _ in range(20):
        wanted = choose.sample(range(NUM_EXPERTS), choose.randint(1, 3))
        acquire(cache, shards, choose.randrange(NUM_LAYERS), wanted)


def held(cache) -> set[ExpertId]:
    return on_device(cache) | in_host(cache)


def assert_contents(cache, shards) -> None:
    for tier in (cache._on_device, cache._in_host):
        for expert, place in tier.places.items():
            shards.assert_in(cache.tiers.memory(tier, place), expert)


def await_reads(reader: Tickets) -> None:
    for _, ticket in reader.submitted:
        with ticket.changed:
            assert ticket.changed.wait_for(lambda ticket=ticket: ticket.done, 20)


class Evictions:
    """Holds every expert that goes for another to be colder than it."""

    def __init__(self, cache, uses: Uses, hot: list[ExpertId], monkeypatch) -> None:
        fetch_behind, forget = cache.fetch_behind, cache.tiers.forget
        incoming = []

        def noting_fetch(expert, *args, **kwargs):
            incoming.append(expert)
            return fetch_behind(expert, *args, **kwargs)

        def noting_forget(expert):
            assert expert not in hot
            if expert.layer == incoming[-1].layer:
                assert uses.share(expert) < uses.share(incoming[-1])
            return forget(expert)

        monkeypatch.setattr(cache, "fetch_behind", noting_fetch)
        monkeypatch.setattr(cache.tiers, "forget", noting_forget)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_missing_comes_and_only_what_is_colder_goes(shards, reader, monkeypatch, seed):
    choose = random.Random(seed)
    cache, places = random_cache(shards, reader, choose)
    warm(cache, shards, choose)
    uses = random_uses(choose)
    hot = uses.ranked()[:places]
    Evictions(cache, uses, hot, monkeypatch)
    before = held(cache)
    refill = Refill(cache, uses, hot, STRIDE_BYTES)
    assert refill.num_total == len(set(hot) - before)
    while not refill.is_done:
        refill.advance()
        cache.check_integrity()
        await_reads(reader)
    now = held(cache)
    assert_contents(cache, shards)
    assert refill.num_done == len((now - before) & set(hot))
    assert refill.num_done + refill.num_left_out == refill.num_total
    # By brute force: of no layer something colder is held while something hotter is not.
    for missing in set(hot) - now:
        others = [one for one in now - set(hot) if one.layer == missing.layer]
        assert all(uses.share(one) >= uses.share(missing) for one in others)
        assert len(now) == places


@pytest.mark.parametrize("seed", range(30))
def test_traffic_beside_it_gets_its_experts_and_nothing_is_lost(shards, reader, monkeypatch, seed):
    choose = random.Random(seed)
    cache, places = random_cache(shards, reader, choose)
    warm(cache, shards, choose)
    uses = random_uses(choose)
    hot = uses.ranked()[:places]
    Evictions(cache, uses, hot, monkeypatch)
    refill = Refill(cache, uses, hot, STRIDE_BYTES)
    for _ in range(60):
        refill.advance()
        cache.check_integrity()
        layer = choose.randrange(NUM_LAYERS)
        cache.predict((layer + 1) % NUM_LAYERS, choose.sample(range(NUM_EXPERTS), 2))
        acquire(cache, shards, layer, choose.sample(range(NUM_EXPERTS), choose.randint(1, 4)))
        cache.check_integrity()
        if choose.random() < 0.02:
            refill.stop()
    await_reads(reader)
    refill.advance()
    assert refill.is_done
    assert refill.num_done + refill.num_left_out == refill.num_total


def cold_cache(shards, reader) -> tuple:
    """A cache that holds what is never wanted, and the refill that has not begun yet."""
    cache = make_cache(shards, reader, 6, 0)
    for layer in range(NUM_LAYERS):
        acquire(cache, shards, layer, [3, 4])
    uses = Uses(NUM_LAYERS, NUM_EXPERTS)
    uses.restore([9.0] * NUM_LAYERS, [[0.9, 0.8, 0.1, 0.0, 0.0]] * NUM_LAYERS)
    hot = uses.ranked()[:6]
    return cache, Refill(cache, uses, hot, STRIDE_BYTES), hot


def test_a_stopped_refill_gives_back_every_place(shards, reader, monkeypatch):
    cache, refill, _hot = cold_cache(shards, reader)
    opened, real = threading.Event(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: opened.wait(20) and real(*args))
    refill.advance()
    refill.stop()
    assert refill.is_done
    assert refill.num_left_out == refill.num_total == 6
    cache.check_integrity()
    opened.set()
    for layer in range(NUM_LAYERS):
        acquire(cache, shards, layer, [0, 1, 2])
    cache.check_integrity()
    assert_contents(cache, shards)
    assert len(held(cache)) == 6


def test_what_cannot_be_read_is_left_out_and_the_others_come(shards, reader, monkeypatch):
    cache, refill, hot = cold_cache(shards, reader)
    broken = {part.file_offset for part in shards.records[hot[2]]}
    read = type(reader)._read

    def failing(self, file, ticket, block, window):
        if block.segment.file_offset in broken:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, file, ticket, block, window)

    monkeypatch.setattr(type(reader), "_read", failing)
    while not refill.is_done:
        refill.advance()
        await_reads(reader)
    cache.check_integrity()
    assert (refill.num_done, refill.num_left_out) == (5, 1)
    assert held(cache) >= set(hot) - {hot[2]}


def test_a_demand_read_for_an_expert_that_is_coming_takes_it_over(shards, reader, monkeypatch):
    cache, refill, hot = cold_cache(shards, reader)
    opened, real = threading.Event(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: opened.wait(20) and real(*args))
    refill.advance()
    reads = len(reader.submitted)
    threading.Timer(0.05, opened.set).start()
    acquire(cache, shards, hot[0].layer, [hot[0].expert])
    assert len(reader.submitted) == reads, "it was on its way: nothing is read twice"
    while not refill.is_done:
        await_reads(reader)
        refill.advance()
    assert held(cache) == set(hot)
    assert refill.num_done == 6
