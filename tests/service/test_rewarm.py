"""RunWarmup on a live server: behind requests, told as it goes, and no change of state."""

import asyncio
import contextlib
import os
import signal

import grpc
import pytest_asyncio
from click.testing import CliRunner

from moe_server.cli import cli
from moe_server.proto.moe_server.v1 import admin_pb2
from moe_server.state import ServerState
from moe_server.warmup.limits import Limits
from moe_server.warmup.probe import ProbeShape
from tests.front_door import eventually, failure, front_door, request

RUN = admin_pb2.RunWarmupRequest


@pytest_asyncio.fixture
async def door():
    async with front_door("--rewarm-steps", "5") as door:
        yield door


async def test_progress_then_probes(door):
    told = [one async for one in door.admin.RunWarmup(RUN())]
    assert [one.experts_done for one in told[:-1]] == [1, 2, 3, 4, 5]
    assert all(one.experts_total == 5 and one.model == "demo" for one in told)
    assert not told[-2].probes
    assert [probe.prompt_tokens for probe in told[-1].probes] == [2, 2]
    assert told[-1].missed == ""
    assert door.server.supervisor.state is ServerState.READY


async def test_its_probes_give_way_to_every_request(door, monkeypatch):
    submit, priorities = door.server.supervisor.submit, []

    def noted(place, message) -> None:
        priorities.append(message.priority)
        submit(place, message)

    monkeypatch.setattr(door.server.supervisor, "submit", noted)
    async for _ in door.admin.RunWarmup(RUN()):
        pass
    assert priorities == [-10, -10]


async def test_requests_are_served_meanwhile_and_a_missed_limit_changes_no_state(door, monkeypatch):
    monkeypatch.setattr(Limits, "missed", lambda *_: "too slow")
    call = door.admin.RunWarmup(RUN(model="demo"))
    async for one in call:
        async for _ in door.generation.GenerateStream(request([1])):
            pass
        last = one
    assert last.missed == "too slow"
    assert door.server.supervisor.state is ServerState.READY


async def test_what_cannot_be_is_refused(door):
    assert "no model 'none'" in (await failure(door.admin.RunWarmup(RUN(model="none")))).message
    await door.server.models.drain()
    refused = await failure(door.admin.RunWarmup(RUN()))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert "draining" in refused.message


async def test_one_at_a_time_and_a_caller_that_goes_ends_it():
    async with front_door("--rewarm-steps", "1000000") as door:
        first = door.admin.RunWarmup(RUN())
        assert (await first.read()).experts_done >= 1
        second = await failure(door.admin.RunWarmup(RUN()))
        assert second.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()

        rewarmings = door.server.supervisor._rewarmings
        await eventually(lambda: rewarmings._current is None)
        assert (await door.admin.RunWarmup(RUN()).read()).experts_done >= 1


async def test_a_lost_engine_ends_it():
    async with front_door("--rewarm-steps", "1000000") as door:
        pid = door.server.supervisor.engine_pid

        async def rewarm() -> None:
            async for _ in door.admin.RunWarmup(RUN()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        assert (await failure(rewarm())).code is grpc.StatusCode.UNAVAILABLE


async def test_the_command(door, monkeypatch):
    def invoke():
        return CliRunner().invoke(cli, ["rewarm", "--target", door.server.address])

    result = await asyncio.to_thread(invoke)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("first token") == 2
    monkeypatch.setattr(Limits, "missed", lambda *_: "too slow")
    result = await asyncio.to_thread(invoke)
    assert result.exit_code == 5
    assert "too slow" in result.output


async def test_a_server_that_is_too_busy_for_its_probes_says_that_it_passes(monkeypatch):
    async with front_door("--refuse-token", "98") as door:
        monkeypatch.setattr(ProbeShape, "prompt", lambda *_: [98])
        refused = await failure(door.admin.RunWarmup(RUN()))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert "No blocks." in refused.message
