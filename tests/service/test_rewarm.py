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
from tests.front_door import eventually, failure, front_door, request

RUN = admin_pb2.RunWarmupRequest


@pytest_asyncio.fixture
async def door():
    async with front_door("--rewarm-steps", "5") as door:
        yield door


async def test_progress_is_told_and_no_request_is_sent(door):
    accepted = door.num_submits
    told = [one async for one in door.admin.RunWarmup(RUN())]
    assert [one.experts_done for one in told] == [1, 2, 3, 4, 5]
    assert all(one.experts_total == 5 and one.model == "demo" for one in told)
    assert door.server.supervisor.state is ServerState.READY
    assert door.num_submits == accepted, "its tokens would want other experts"


async def test_requests_are_served_meanwhile(door):
    async for one in door.admin.RunWarmup(RUN(model="demo")):
        async for _ in door.generation.GenerateStream(request([1])):
            pass
        last = one
    assert last.experts_done == 5
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


async def test_the_command(door):
    args = ["rewarm", "--target", door.server.address]
    result = await asyncio.to_thread(CliRunner().invoke, cli, args)
    assert result.exit_code == 0, result.output
    assert "5 of 5" in result.stderr
