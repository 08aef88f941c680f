"""Engines and servers that learn which experts are wanted, and others that start with that."""

import asyncio
import os
import random
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.engine_server import children_of
from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.client import Client, UnreachableError
from moe_server.config import load_config
from moe_server.messages import (
    NO_HOT_SET,
    HotSet,
    Loaded,
    Rewarm,
    RewarmOutcome,
    RewarmProgress,
    StopRewarm,
    Submit,
    TellHotSet,
)
from moe_server.offload.layout import ExpertId
from moe_server.offload.reader import Reader
from moe_server.proto.moe_server.v1 import admin_pb2, generation_pb2
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.supervisor import ENGINE_COMMAND, Supervisor
from moe_server.warmup.hot_set import decode, encode, fingerprint
from moe_server.warmup.stages import HOT_SET, StageState
from tests.driver import greedy, run, running_engine, token_ids
from tests.front_door import PATIENCE, WAIT_S, eventually
from tests.test_faults import NEW_TOKENS, PROMPTS, TINY, undisturbed
from tests.test_supervisor import Notebook

ALL = [ExpertId(layer, one) for layer in range(TINY.layers) for one in range(TINY.experts)]
TOPIC = [[7] * 12, [7, 7, 7, 7]]


def memory_for(path: Path, num_slots: int, num_records: int = 0) -> dict[str, int]:
    """Flags with which so many experts have a place."""
    flags = {"model": str(path), "max_total_tokens": 256, "device_memory": "min"}
    smallest = plan_memory(load_config(flags=flags, environ={}), read_checkpoint(path))
    device_memory = smallest.minimum_device_bytes + (num_slots - 1) * smallest.slot_bytes
    return {
        "max_total_tokens": 256,
        "device_memory": device_memory,
        "host_memory": num_records * smallest.slot_bytes,
    }


def some_hot_set(seed: int = 0) -> HotSet:
    choose = random.Random(seed)
    shares = [[choose.random() for _ in range(TINY.experts)] for _ in range(TINY.layers)]
    return HotSet([500.0] * TINY.layers, shares)


def ranked(hot_set: HotSet) -> list[ExpertId]:
    """By rank within the layer, then by layer."""

    def rank(expert: ExpertId) -> int:
        shares = hot_set.shares[expert.layer]
        return sum(share > shares[expert.expert] for share in shares)

    return sorted(ALL, key=lambda expert: (rank(expert), expert.layer))


def told_by(engine) -> HotSet:
    engine.take(TellHotSet())
    [hot_set] = engine.between_steps()
    return hot_set


def near(engine) -> set[ExpertId]:
    return {*engine.cache.tiers.on_device.places, *engine.cache.tiers.in_host.places}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(path) -> list[list[int]]:
    return undisturbed(path)


@pytest.fixture
def reads(path, monkeypatch) -> list[ExpertId]:
    """Experts in the order in which they are asked from disk."""
    records = {parts: expert for expert, parts in read_checkpoint(path).experts.items()}
    asked = []
    submit = Reader.submit

    def noting(self, segments, *args, **kwargs):
        if tuple(segments) in records:
            asked.append(records[tuple(segments)])
        return submit(self, segments, *args, **kwargs)

    monkeypatch.setattr(Reader, "submit", noting)
    return asked


def test_what_steps_want_is_counted_and_what_loading_touches_is_not(path):
    with running_engine(path) as engine:
        assert told_by(engine).visits == [0.0] * TINY.layers
        [events] = run(engine, greedy(TOPIC[:1], NEW_TOKENS))
        told = told_by(engine)
        # The prompt is one visit of a layer, and so is every token but the last.
        assert told.visits == pytest.approx([len(events)] * TINY.layers, rel=0.01)
        for shares in told.shares:
            assert sum(shares) >= 0.999 * TINY.top_k
            assert max(shares) <= 1.0001


def test_a_hot_set_is_told_when_it_is_due_and_there_is_news(path):
    with running_engine(path, **{"warmup.hot_set_every_s": 1e-6}) as engine:
        assert engine.between_steps() == []
        run(engine, greedy(TOPIC, 2))
        assert [type(message) for message in engine.between_steps()] == [HotSet]
        assert engine.between_steps() == []


@pytest.mark.parametrize(("slots", "records"), [(1, 0), (2, 1), (9, 0), (10, 5), (24, 0), (13, 11)])
@pytest.mark.parametrize("policy", ["next-visit", "layer-lfu", "layer-lru"])
def test_a_start_reads_the_hottest_first_and_keeps_them(
    path, expected, reads, slots, records, policy
):
    hot_set = some_hot_set(slots)
    order, places = ranked(hot_set), slots + records
    memory = memory_for(path, slots, records)
    with running_engine(path, None, hot_set, expert_policy=policy, **memory) as engine:
        engine.cache.check_integrity()
        begun = places - (places < len(ALL))
        assert reads[:begun] == order[:begun]
        assert sorted(reads) == sorted(ALL), "every expert once, and none twice"
        assert near(engine) == set(order[:places])
        assert told_by(engine).shares == [pytest.approx(shares) for shares in hot_set.shares]
        found = [token_ids(events) for events in run(engine, greedy(PROMPTS, NEW_TOKENS))]
        assert found == expected


def test_a_restarted_engine_finds_what_its_traffic_wants(path):
    memory = memory_for(path, 2 * TINY.top_k * TINY.layers)

    def misses(hot_set: HotSet) -> int:
        with running_engine(path, None, hot_set, **memory) as engine:
            before = engine.cache.counters.disk_reads
            run(engine, greedy(TOPIC, 1))
            return engine.cache.counters.disk_reads - before

    with running_engine(path, **memory) as engine:
        run(engine, greedy(TOPIC, 1))
        learned = told_by(engine)
    assert misses(learned) == 0 < misses(NO_HOT_SET)


def test_a_start_tells_the_policy_what_is_hot(path):
    hot_set = some_hot_set(5)
    staying = ranked(hot_set)[:9]
    memory = memory_for(path, 9)
    with running_engine(path, None, hot_set, expert_policy="layer-lfu", **memory) as engine:
        policy = engine.cache.tiers.on_device.policy
        for layer in range(TINY.layers):
            coldest = [expert for expert in staying if expert.layer == layer][-1]
            assert policy.victim(ExpertId(layer, 99), keep=()) == coldest


# Rewarming


def rewarmed(engine, rewarm_id: int = 1) -> list[RewarmProgress]:
    """What is told of a rewarming from beginning to end, other work going on beside it."""
    told: list[RewarmProgress] = []
    engine.take(Rewarm(rewarm_id))
    while not (told and told[-1].outcome):
        engine.step()
        told += engine.between_steps()
        engine.cache.check_integrity()
    return told


STORM = [[choice] * 9 for choice in (11, 50, 90, 130, 170, 210, 250, 290)]


@pytest.mark.parametrize(("slots", "records"), [(9, 0), (6, 6), (24, 0)])
def test_after_a_storm_what_was_hot_comes_back(path, slots, records):
    hot_set = some_hot_set(1)
    places = slots + records
    hot = set(ranked(hot_set)[:places])
    with running_engine(path, None, hot_set, **memory_for(path, slots, records)) as engine:
        for _ in range(4):
            run(engine, greedy(STORM, 2))
        missing = len(hot - near(engine))
        assert missing or places == 24
        told = rewarmed(engine)
        assert near(engine) == hot
        last = told[-1]
        assert last.outcome is RewarmOutcome.DONE
        assert (last.experts_done, last.experts_total, last.experts_left_out) == (
            missing,
            missing,
            0,
        )
        assert last.bytes_done == last.bytes_total >= missing * 3 * 2 * TINY.hidden
        assert rewarmed(engine, 2)[-1].experts_total == 0


def test_requests_beside_a_rewarming_get_the_same_tokens(path, expected):
    with running_engine(path, None, some_hot_set(2), **memory_for(path, 9)) as engine:
        run(engine, greedy(STORM, 2))
        for number in range(3):
            for request in greedy(PROMPTS, NEW_TOKENS):
                engine.submit(request)
            engine.take(Rewarm(number))
            found: list[list[int]] = [[] for _ in PROMPTS]
            while not engine.idle:
                done = engine.step()
                engine.between_steps()
                engine.cache.check_integrity()
                assert not done.failed
                for event in done.tokens:
                    found[event.request_id].append(event.token_id)
            assert found == expected
            engine.take(StopRewarm(number))


def test_the_warm_up_is_not_learned_and_what_it_displaced_comes_back(path):
    hot_set = some_hot_set(6)
    hot = set(ranked(hot_set)[:9])
    with running_engine(path, None, hot_set, **memory_for(path, 9)) as engine:
        run(engine, greedy(STORM, 2))
        assert near(engine) != hot
        engine.take(hot_set)
        while engine.hot_experts.is_rewarming:
            engine.step()
            assert engine.between_steps() == [], "nobody asked"
        assert near(engine) == hot
        told = told_by(engine)
        assert told.visits == pytest.approx(hot_set.visits)
        assert told.shares == [pytest.approx(shares) for shares in hot_set.shares]
        engine.take(NO_HOT_SET)
        assert told_by(engine).visits == [0.0] * TINY.layers


def test_a_rewarming_that_is_asked_for_takes_the_place_of_the_engine_s_own(path):
    hot_set = some_hot_set(6)
    with running_engine(path, None, hot_set, **memory_for(path, 9)) as engine:
        run(engine, greedy(STORM, 2))
        engine.take(hot_set)
        told = rewarmed(engine)
        assert told[-1].outcome is RewarmOutcome.DONE
        assert near(engine) == set(ranked(hot_set)[:9])


def test_a_rewarming_stops_when_it_is_told_to_and_no_other_one_does(path):
    with running_engine(path, None, some_hot_set(3), **memory_for(path, 9)) as engine:
        run(engine, greedy(STORM, 2))
        engine.take(Rewarm(7))
        engine.take(StopRewarm(6))
        assert engine.hot_experts.is_rewarming
        engine.take(StopRewarm(7))
        assert not engine.hot_experts.is_rewarming
        [told] = engine.between_steps()
        assert (told.rewarm_id, told.outcome) == (7, RewarmOutcome.STOPPED)
        assert told.experts_done + told.experts_left_out == told.experts_total > 0
        engine.take(StopRewarm(7))
        assert engine.between_steps() == []


async def storm(supervisor: Supervisor, *, is_probe: bool) -> None:
    for prompt in STORM:
        with supervisor.admit(is_probe=is_probe) as request:
            supervisor.submit(request, Submit(request.request_id, prompt, 2, []))
            async for _ in request:
                pass


async def test_a_supervised_engine_is_ready_with_its_hot_set_and_rewarms(path):
    flags = {"model": str(path), "dense_backend": "resident", **memory_for(path, 9)}
    [config] = load_config(flags=flags, environ={}).all_models
    hot_set = some_hot_set(4)

    async def prove(_loaded: Loaded) -> None:
        await storm(supervisor, is_probe=True)

    supervisor = Supervisor(
        config, prove, ENGINE_COMMAND, PATIENCE, Startup("tiny"), hot_set=Notebook(hot_set)
    )
    supervisor.start()
    try:
        await asyncio.wait_for(supervisor.startup.feed.wait_for(ServerState.READY), WAIT_S)
        restored = supervisor.startup.stages.stages[-1]
        assert (restored.name, restored.state) == (HOT_SET, StageState.DONE)
        assert restored.bytes_done == restored.bytes_total > 0
        [told] = [progress async for progress in supervisor.rewarm()]
        assert (told.outcome, told.experts_total) == (RewarmOutcome.DONE, 0)
        await storm(supervisor, is_probe=False)
        told = [progress async for progress in supervisor.rewarm()]
        assert told[-1].outcome is RewarmOutcome.DONE
        assert told[-1].experts_done == told[-1].experts_total > 0
    finally:
        await supervisor.stop()


# Servers


@asynccontextmanager
async def serving(path: Path, file: Path, **environ: str):
    """`moe-server serve` in a process of its own, READY."""
    memory = memory_for(path, 12)
    variables = {
        "WARMUP__HOT_SET": str(file),
        "WARMUP__PROBES": "1",
        "LISTEN": f"unix:{file.parent / 'socket'}",
        "MODEL": str(path),
        "DENSE_BACKEND": "resident",
        "SCHEDULER__REUSE_PREFIXES": "false",
        **{key.upper(): str(value) for key, value in memory.items()},
        **environ,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "moe_server",
        "serve",
        env={**os.environ, **{f"MOE_SERVER_{key}": value for key, value in variables.items()}},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        with Client(variables["LISTEN"]) as client:
            await eventually(lambda: is_ready(client))
            yield process, client
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def is_ready(client: Client) -> bool:
    try:
        return client.status().state == admin_pb2.SERVER_STATE_READY
    except UnreachableError:
        return False


def ask(client: Client, num_requests: int) -> list[list[int]]:
    stopping = generation_pb2.Stopping(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return [
        [
            token
            for response in client.generate_stream(TOPIC[0], stopping=stopping)
            for token in response.delta.token_ids
        ]
        for _ in range(num_requests)
    ]


def read(path: Path, file: Path) -> HotSet:
    checkpoint = read_checkpoint(path)
    return decode(file.read_bytes(), fingerprint(checkpoint), TINY.layers, TINY.experts)


async def test_a_drain_saves_and_the_next_server_starts_with_it(path, tmp_path):
    file = tmp_path / "hot.json"
    async with serving(path, file, WARMUP__HOT_SET_EVERY_S="1000") as (_, client):
        answers = await asyncio.to_thread(ask, client, 20)
        assert not file.exists()
        await asyncio.to_thread(client.drain)
        saved = read(path, file)
    # A server that was drained has nothing new to tell when it ends.
    assert read(path, file) == saved
    # The requests' visits and none of the warm-up's; 240 have begun to decay.
    assert saved.visits == pytest.approx([20 * NEW_TOKENS] * TINY.layers, rel=0.03)
    async with serving(path, file) as (process, client):
        assert await asyncio.to_thread(ask, client, 20) == answers
        process.terminate()
        assert await process.wait() == 0
    # It went on counting where the first one had stopped.
    both = [2 * 20 * NEW_TOKENS] * TINY.layers
    assert read(path, file).visits == pytest.approx(both, rel=0.06)


async def test_a_sigterm_to_all_processes_lets_the_engine_finish(path, tmp_path):
    # systemd sends it to every process of a unit, `timeout` to every one of a group.
    file = tmp_path / "hot.json"
    async with serving(path, file, WARMUP__HOT_SET_EVERY_S="1000") as (process, client):
        await asyncio.to_thread(ask, client, 3)
        assert not file.exists()
        for child in children_of(process.pid):
            os.kill(child, signal.SIGTERM)
        process.terminate()
        assert await process.wait() == 0
    assert min(read(path, file).visits) > 2 * NEW_TOKENS


async def test_after_kill_9_the_last_periodic_save_counts(path, tmp_path):
    file = tmp_path / "hot.json"
    async with serving(path, file, WARMUP__HOT_SET_EVERY_S="0.01") as (process, client):
        answers = await asyncio.to_thread(ask, client, 3)
        wanted = 2.9 * NEW_TOKENS
        await eventually(lambda: file.exists() and min(read(path, file).visits) > wanted)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    before = read(path, file)
    async with serving(path, file) as (process, client):
        assert await asyncio.to_thread(ask, client, 3) == answers
        process.terminate()
        await process.wait()
    assert min(read(path, file).visits) > min(before.visits) + 2 * NEW_TOKENS


async def test_a_damaged_file_is_warned_about_and_nothing_else(path, tmp_path):
    file = tmp_path / "hot.json"
    file.write_bytes(encode(some_hot_set(), "mine")[:-9])
    async with serving(path, file) as (process, client):
        assert len(await asyncio.to_thread(ask, client, 1)) == 1
        process.terminate()
        _, printed = await process.communicate()
        assert process.returncode == 0
    assert printed.count(b"ignoring the hot set's file") == 1
