import asyncio
import dataclasses
import os
import signal

import grpc
import pytest

from moe_server.config import Config, WarmupConfig
from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import admin_pb2, generation_pb2
from moe_server.state import ServerState
from moe_server.warmup import warm_up
from moe_server.warmup.ladder import ladder, longest_prompt, num_shapes
from moe_server.warmup.limits import Limits
from moe_server.warmup.probe import ProbeShape
from moe_server.warmup.stages import StageLog
from tests.front_door import (
    ANY_TIME,
    WAIT_S,
    eventually,
    failure,
    front_door,
    letters_chat,
    make_config,
    make_model,
    request,
    setup,
)


def warmup(**limits) -> object:
    sizes = {
        "prompt_tokens": 3,
        "new_tokens": 3,
        "batch": 3,
        "probes": 2,
        "attempts": 2,
        **ANY_TIME,
    }
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
        monkeypatch.setattr(Limits, "missed", misses("too slow"))
        os.kill(door.server.supervisor.engine_pid, signal.SIGKILL)
        await door.reach(ServerState.STARTING)
        await door.reach(ServerState.READY)
        assert door.server.supervisor.startup.stages.doing == "proven in round 1"
        assert len(door.server.warm_up.probes) == 1 + 2


async def test_after_a_restart_the_short_round_costs_no_attempt(monkeypatch):
    async with front_door(config=warmup(max_ttft_ms=10_000, attempts=1)) as door:
        monkeypatch.setattr(Limits, "missed", misses("too slow"))
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
        assert reason.endswith("or raise the limit.")
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


def misses(*missed: str):
    """What probes miss, one after another; nothing once they are used up."""
    left = iter(missed)
    return lambda *_: next(left, "")


async def test_a_failed_proof_is_tried_again_and_becomes_ready_when_the_cause_has_gone(monkeypatch):
    monkeypatch.setattr(Limits, "missed", misses("too slow", "too slow"))
    async with front_door(config=warmup(), until=ServerState.FAILED) as door:
        pid = door.server.supervisor.engine_pid
        failed = await failure(door.generation.GenerateStream(request([1])))
        assert failed.code is grpc.StatusCode.UNAVAILABLE
        await door.reach(ServerState.READY)
        assert door.server.supervisor.engine_pid == pid, "what it has loaded is kept"
        assert door.server.supervisor.startup.reason == ""


async def test_a_missed_limit_may_be_served_with_and_is_told(monkeypatch):
    monkeypatch.setattr(Limits, "missed", misses("too slow"))
    async with front_door(config=warmup(if_missed="serve", attempts=1)) as door:
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        [model] = status.models
        assert model.startup.degraded == "The proof failed once; last: probe 1 of 2: too slow."
        assert model.startup.stage == "ready, but slower than its limits"
        assert model.startup.stages[-1].state == admin_pb2.STAGE_STATE_FAILED
        assert not model.startup.HasField("max_ttft"), "any time"
        async for _ in door.generation.GenerateStream(request([1])):
            pass


async def test_what_was_missed_is_told_of_a_model_that_serves_only(monkeypatch, tmp_path):
    monkeypatch.setattr(Limits, "missed", misses("too slow"))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    config = warmup(if_missed="serve", attempts=1)
    async with front_door("--gate", str(gate), config=config, until=ServerState.LOADING) as door:
        await asyncio.to_thread(gate.write_bytes, b"go")
        await door.reach(ServerState.READY)
        running = door.server.models.find("")
        assert running.degraded
        os.kill(running.supervisor.engine_pid, signal.SIGKILL)
        await door.reach(ServerState.LOADING)
        assert running.degraded == ""


async def test_beside_other_requests_what_was_missed_stays_missed(monkeypatch):
    monkeypatch.setattr(Limits, "missed", misses("too slow"))
    async with front_door(config=warmup(if_missed="serve", attempts=1)) as door:
        warm_up = door.server.warm_up
        missed = warm_up.degraded
        await warm_up.prove(Limits(), is_alone=False)
        assert warm_up.degraded == missed != ""
        assert "not timed" in door.server.supervisor.startup.stages.doing
        await warm_up.prove(Limits())
        assert warm_up.degraded == ""


async def test_limits_in_force_are_told():
    async with front_door(config=warmup(max_ttft_ms=9000, max_tpot_ms=None)) as door:
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        startup = status.models[0].startup
        assert startup.max_ttft.ToMilliseconds() == 9000
        assert not startup.HasField("max_tpot"), "the fake engine measures nothing"


async def test_a_stage_whose_request_fails_is_tried_again_by_itself():
    # Of a vocabulary of one every prompt has the token that is refused.
    flags = ("--vocab", "1", "--refuse-token", "0")
    model = make_model(vocab_size=1)
    until = ServerState.WARMING
    async with front_door(*flags, config=warmup(), model=model, until=until) as door:
        startup = door.server.supervisor.startup
        await eventually(lambda: "The request shapes failed 2 times" in startup.stages.doing)
        assert startup.state is ServerState.WARMING, "what is exhausted can be there again"
        assert startup.stages.stages[-1].name == "request shapes"
        assert "RESOURCE_EXHAUSTED: No blocks." in startup.stages.stages[-1].failure


async def test_a_recorded_request_that_fails_is_a_failure_of_its_stage():
    flags = ("--refuse-token", "98")  # No shape has it.
    ids = generation_pb2.TokenIds(ids=[98])
    asked = generation_pb2.GenerateStreamRequest(token_ids=ids)
    recorded = [generation_pb2.RecordedRequest(request=asked)] * 2
    first = dataclasses.replace(setup(*flags, config=warmup()), requests=recorded)
    until = ServerState.WARMING
    async with front_door(config=warmup(), first=first, until=until) as door:
        startup = door.server.supervisor.startup
        await eventually(lambda: "The recorded requests failed 2 times" in startup.stages.doing)
        assert "No blocks." in startup.stages.doing
        assert door.server.supervisor.num_restarts == 0, "no fault of the engine's"


async def test_a_shape_that_fails_ends_the_others_before_they_are_sent_again(monkeypatch):
    running, most = 0, 0

    async def send(_channel, shape, *_) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            if shape.new_tokens == 2:
                raise MoeServerError("This one fails.")
            await asyncio.Event().wait()
        finally:
            running -= 1

    monkeypatch.setattr(warm_up, "send_probe", send)
    probe = ProbeShape("m", vocab_size=9, prompt_tokens=1, new_tokens=2, max_request_tokens=9)
    shapes = [probe, dataclasses.replace(probe, new_tokens=3)]
    first = warm_up.FirstRequests(shapes, None)
    one = warm_up.WarmUp(WarmupConfig(attempts=3), probe, first, "unix:none", (), StageLog())
    with pytest.raises(MoeServerError, match="The request shapes failed 3 times"):
        await one.prove(Limits())
    assert most <= 2


async def warnings_of_text(**model) -> list[str]:
    async with front_door(config=warmup(text=True), model=make_model(**model)) as door:
        shapes, _ = door.server.supervisor.startup.stages.stages[-2:]
        return list(shapes.warnings)


async def test_text_is_sent_where_there_is_a_tokenizer():
    assert await warnings_of_text() == []
    assert await warnings_of_text(has_tokenizer=False) == []


async def test_a_chat_template_that_refuses_is_a_warning():
    [warning] = await warnings_of_text(chat=letters_chat("{{ raise_exception('never') }}"))
    assert warning.startswith("A messages request is refused")
    assert "never" in warning


def test_the_ladder_has_every_length_and_every_batch():
    probe = ProbeShape("m", vocab_size=9, prompt_tokens=16, new_tokens=2, max_request_tokens=600)
    shapes = list(ladder(probe, 512, 6))
    assert [shape.prompt_tokens for shape in shapes] == [512, 128, 32, 8, 2, 1]
    assert [shape.new_tokens for shape in shapes] == [2, 3, 4, 5, 6, 7]
    short = dataclasses.replace(probe, max_request_tokens=8)
    assert all(shape.prompt_tokens + shape.new_tokens <= 8 for shape in ladder(short, 512, 6))


def test_a_cpu_is_sent_no_shapes_and_a_gpu_no_more_than_run():
    assert num_shapes(Config()) == 0
    assert num_shapes(Config(device="cuda")) == 4
    assert num_shapes(Config(device="cuda", scheduler={"max_running": 3})) == 3
    assert num_shapes(Config(warmup={"batch": 2})) == 2


async def test_where_there_are_no_first_requests_there_is_no_such_stage():
    async with front_door(config=warmup(batch=0)) as door:
        names = [stage.name for stage in door.server.supervisor.startup.stages.stages]
        assert names[-2:] == ["experts", "proof"]


def test_programs_for_a_gpu_meet_a_whole_step():
    assert longest_prompt(Config()) == 16
    assert longest_prompt(Config(device="cuda")) == 512
    assert longest_prompt(Config(warmup={"longest_prompt_tokens": 99})) == 99


async def test_a_cancellation_as_requests_fail_is_not_lost():
    """Else the warm-up would be tried again for ever, and who stopped the server wait for it."""
    begun = asyncio.Event()

    async def fails_when_cancelled() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise MoeServerError("Refused: the server is shutting down.") from None

    sending = asyncio.create_task(warm_up._side_by_side([fails_when_cancelled()]))
    await begun.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
