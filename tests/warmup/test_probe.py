import asyncio
import os
import signal

import pytest

from moe_server.config import WarmupConfig
from moe_server.state import ServerState
from moe_server.warmup.probe import Probe, ProbeShape, missed_limits
from tests.front_door import WAIT_S, front_door, make_config, make_model


def warmup(**limits) -> object:
    sizes = {"prompt_tokens": 3, "new_tokens": 3, "batch": 3, "probes": 2, "attempts": 2}
    return make_config(warmup=WarmupConfig(**{**sizes, **limits}))


async def states_until(door, last: ServerState) -> list[ServerState]:
    states = []
    with door.server.supervisor.startup.feed.watch() as watcher:
        while not states or states[-1] is not last:
            states.append(await asyncio.wait_for(watcher.next(), WAIT_S))
    return states


async def test_ready_rests_on_probes_through_grpc():
    async with front_door(config=warmup(max_ttft_ms=10_000, max_tpot_ms=10_000)) as door:
        probes = door.server.warm_up.probes
        assert [(probe.prompt_tokens, probe.completion_tokens) for probe in probes] == [(3, 3)] * 2
        assert all(probe.ttft_s > 0 and probe.tpot_s >= 0 for probe in probes)
        assert door.server.supervisor.startup.stages.doing == "proven in round 1"
        # 3 side by side, then 2 one after another.
        assert door.num_submits in (0, 5)


async def test_after_a_restart_one_probe_is_enough_and_none_comes_twice(monkeypatch):
    seeds = []
    prompt = ProbeShape.prompt

    def noted(shape, seed):
        seeds.append(seed)
        return prompt(shape, seed)

    monkeypatch.setattr(ProbeShape, "prompt", noted)
    async with front_door(config=warmup()) as door:
        os.kill(door.server.supervisor.engine_pid, signal.SIGKILL)
        await door.reach(ServerState.STARTING)
        await door.reach(ServerState.READY)
        assert len(door.server.warm_up.probes) == 1
        assert seeds == list(range(3 + 2 + 1))


async def test_after_a_restart_a_missed_limit_calls_for_a_whole_round(monkeypatch):
    async with front_door(config=warmup(max_ttft_ms=10_000)) as door:
        misses = iter(["too slow"])
        monkeypatch.setattr("moe_server.warmup.probe.missed_limits", lambda *_: next(misses, ""))
        os.kill(door.server.supervisor.engine_pid, signal.SIGKILL)
        await door.reach(ServerState.STARTING)
        await door.reach(ServerState.READY)
        assert door.server.supervisor.startup.stages.doing == "proven in round 1"
        assert len(door.server.warm_up.probes) == 1 + 2


async def test_after_a_restart_the_short_round_costs_no_attempt(monkeypatch):
    async with front_door(config=warmup(max_ttft_ms=10_000, attempts=1)) as door:
        misses = iter(["too slow"])
        monkeypatch.setattr("moe_server.warmup.probe.missed_limits", lambda *_: next(misses, ""))
        os.kill(door.server.supervisor.engine_pid, signal.SIGKILL)
        await door.reach(ServerState.STARTING)
        await door.reach(ServerState.READY)
        assert door.server.supervisor.startup.stages.doing == "proven in round 1"


async def test_a_missed_limit_is_retried_then_failed_with_the_figures():
    config = warmup(max_ttft_ms=1.0)
    until = ServerState.STARTING
    async with front_door("--step-s", "0.02", config=config, until=until) as door:
        states = await states_until(door, ServerState.FAILED)
        assert ServerState.READY not in states
        reason = door.server.supervisor.startup.reason
        assert "failed 2 times" in reason
        assert "time to first token" in reason
        assert "over max_ttft_ms = 1" in reason
        assert len(door.server.warm_up.probes) == 2


async def test_time_per_token_is_judged_too():
    config = warmup(max_tpot_ms=1.0)
    until = ServerState.STARTING
    async with front_door("--step-s", "0.02", config=config, until=until) as door:
        await states_until(door, ServerState.FAILED)
        assert "over max_tpot_ms = 1" in door.server.supervisor.startup.reason


async def test_an_engine_lost_while_warming_is_proven_anew(tmp_path):
    # Token 1 follows a 0, which a prompt of this vocabulary of one always ends with.
    flags = ("--vocab", "1", "--crash-token", "0", "--crash-once", str(tmp_path / "crashed"))
    model = make_model(vocab_size=1)
    async with front_door(*flags, config=warmup(), model=model) as door:
        assert door.server.supervisor.num_restarts == 1
        assert len(door.server.warm_up.probes) == 2


async def test_lengths_are_cut_to_what_the_model_takes():
    model = make_model(max_request_tokens=4)
    async with front_door(config=warmup(prompt_tokens=1000), model=model) as door:
        assert {probe.prompt_tokens for probe in door.server.warm_up.probes} == {1}


@pytest.mark.parametrize(
    ("prompt", "new", "limit", "expected"),
    [(64, 4, 1000, (64, 4)), (64, 4, 10, (6, 4)), (64, 4, 3, (1, 2)), (64, 4, 2, (1, 1))],
)
def test_fitting(prompt, new, limit, expected):
    shape = ProbeShape.fitting(prompt, new, model="", vocab_size=9, max_request_tokens=limit)
    assert (shape.prompt_tokens, shape.new_tokens) == expected


def test_prompts_differ_by_seed_and_repeat_with_it():
    shape = ProbeShape(model="", vocab_size=32_000, prompt_tokens=64, new_tokens=4)
    prompts = [shape.prompt(seed) for seed in range(50)]
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert shape.prompt(7) == prompts[7]
    assert all(0 <= token < 32_000 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("max_ttft_ms", "max_tpot_ms", "missed"),
    [
        (None, None, ""),
        (100.0, 10.0, ""),
        (99.0, None, "time to first token 100.0 ms, 1.0 ms over max_ttft_ms = 99"),
        (None, 4.0, "time per output token 10.0 ms, 6.0 ms over max_tpot_ms = 4"),
    ],
)
def test_missed_limits(max_ttft_ms, max_tpot_ms, missed):
    assert missed_limits(Probe(8, 4, 0.1, 0.01), max_ttft_ms, max_tpot_ms) == missed
