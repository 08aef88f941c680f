import asyncio
import os
from types import SimpleNamespace

import grpc
import pytest
import pytest_asyncio

from moe_server.proto.moe_server.v1 import admin_pb2, admin_pb2_grpc
from moe_server.service.admin import LOOK_S, AdminService
from moe_server.service.errors import PermissionDeniedError
from moe_server.state import ServerState
from tests.front_door import eventually, failure, front_door, make_config, make_model
from tests.front_door import request as make

pytestmark = pytest.mark.asyncio(loop_scope="module")


def drain(seconds: float | None = None) -> admin_pb2.DrainRequest:
    request = admin_pb2.DrainRequest()
    if seconds is not None:
        request.wait.FromMilliseconds(round(seconds * 1000))
    return request


async def test_status_tells_state_memory_load_and_probes():
    async with front_door() as door:
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        memory = make_model().memory
        assert status.state == admin_pb2.SERVER_STATE_READY
        assert (status.model, status.reason, status.engine_restarts) == ("demo", "", 0)
        assert status.version
        assert status.memory.device_budget_bytes == memory.device_budget_bytes
        assert status.memory.expert_slots_bytes == memory.slots_bytes
        assert status.memory.experts == memory.num_experts_total
        assert status.memory.embedding_on_disk_bytes == 54_321
        assert [probe.completion_tokens for probe in status.startup.probes] == [2, 2]
        assert all(probe.ttft.ToNanoseconds() > 0 for probe in status.startup.probes)
        assert (status.load.kv_blocks_kept, status.load.preemptions) == (5, 6)
        assert (status.load.prompt_tokens, status.load.cached_tokens) == (7, 8)
        assert status.load.hopeless_requests == 9
        assert status.load.overdue_requests == 10
        again = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        assert again.startup.elapsed == status.startup.elapsed
        assert again.uptime.ToNanoseconds() > status.uptime.ToNanoseconds()


async def test_a_watcher_sees_every_stage_of_a_start_and_its_end(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    until = ServerState.LOADING
    async with front_door("--gate", str(gate), until=until) as door:
        watch = aiter(door.admin.WatchStartup(admin_pb2.WatchStartupRequest()))
        loading = await anext(watch)
        assert (loading.model, loading.state) == ("demo", admin_pb2.SERVER_STATE_LOADING)
        [stage] = loading.startup.stages
        assert (stage.name, stage.bytes_total) == ("weights", 100)
        assert stage.state == admin_pb2.STAGE_STATE_RUNNING
        await asyncio.to_thread(gate.write_bytes, b"go")
        told = [one async for one in watch]
        assert [one.state for one in told][-1] == admin_pb2.SERVER_STATE_READY
        stages = told[-1].startup.stages
        assert [stage.name for stage in stages] == ["weights", "experts", "request shapes", "proof"]
        assert all(stage.state == admin_pb2.STAGE_STATE_DONE for stage in stages)
        assert all(stage.attempts == 1 for stage in stages)
        late = [one async for one in door.admin.WatchStartup(admin_pb2.WatchStartupRequest())]
        assert [one.state for one in late] == [admin_pb2.SERVER_STATE_READY]


async def test_a_watcher_hears_why_an_engine_does_not_start_and_that_it_is_tried_again():
    async with front_door("--fatal", "retry", until=ServerState.STARTING) as door:
        async for told in door.admin.WatchStartup(admin_pb2.WatchStartupRequest(model="demo")):
            if any(stage.attempts > 2 for stage in told.startup.stages):
                break
        [stage] = told.startup.stages
        assert (stage.name, stage.failure) == ("weights", "No memory.")


async def test_a_watcher_of_a_failed_start_is_told_why_and_ends():
    async with front_door("--fatal", "final", until=ServerState.FAILED) as door:
        [told] = [one async for one in door.admin.WatchStartup(admin_pb2.WatchStartupRequest())]
        assert told.state == admin_pb2.SERVER_STATE_FAILED
        assert told.reason == "No memory. Buy some."


async def test_watching_is_bounded_and_an_unknown_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_server.service.admin.MAX_WATCHERS", 1)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    until = ServerState.LOADING
    async with front_door("--gate", str(gate), until=until) as door:
        first = door.admin.WatchStartup(admin_pb2.WatchStartupRequest())
        await anext(aiter(first))
        second = await failure(door.admin.WatchStartup(admin_pb2.WatchStartupRequest()))
        assert second.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await asyncio.sleep(2 * LOOK_S)
        third = door.admin.WatchStartup(admin_pb2.WatchStartupRequest())
        await anext(aiter(third))
        unknown = await failure(door.admin.WatchStartup(admin_pb2.WatchStartupRequest(model="x")))
        assert unknown.code == grpc.StatusCode.NOT_FOUND
        await asyncio.to_thread(gate.write_bytes, b"go")


async def test_drain_waits_for_accepted_requests_and_refuses_new_ones():
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", model=model) as door:
        running = door.generation.GenerateStream(make([1], max_new_tokens=40, ignore_eos=True))
        events = aiter(running)
        await anext(events)
        at_once = await door.admin.Drain(drain())
        assert at_once.remaining_requests == 1
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        assert status.state == admin_pb2.SERVER_STATE_DRAINING
        assert status.startup.stage == "proven in round 1"
        refused = await failure(door.generation.GenerateStream(make([1])))
        assert refused.code == grpc.StatusCode.UNAVAILABLE
        assert refused.details[0].retry_delay.seconds > 0
        done, rest = await asyncio.gather(door.admin.Drain(drain(15)), _rest_of(events))
        assert done.remaining_requests == 0
        assert rest[-1].finished.usage.completion_tokens == 40
        await door.admin.Undrain(admin_pb2.UndrainRequest())
        again = [event async for event in door.generation.GenerateStream(make([1]))]
        assert again[-1].HasField("finished")


async def _rest_of(events):
    return [event async for event in events]


async def test_a_wait_that_ends_first_says_what_remains():
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", model=model) as door:
        running = door.generation.GenerateStream(make([1], max_new_tokens=9000, ignore_eos=True))
        await running.read()
        response = await door.admin.Drain(drain(0.05))
        assert response.remaining_requests == 1
        running.cancel()
        await eventually(lambda: door.server.supervisor.num_open_requests == 0)
        for wait_s in (-1, 86_401, 315_576_000_000):
            failed = await failure(door.admin.Drain(drain(wait_s)))
            assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
            assert failed.details[0].field_violations[0].field == "wait"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door() as door:
        yield door


@pytest.mark.parametrize(
    ("peer", "may"),
    [
        ("ipv4:127.0.0.1:4", True),
        ("ipv6:[::1]:4", True),
        ("ipv6:%5B::1%5D:4", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:4", False),
        ("ipv6:[fe80::1]:4", False),
        ("", False),
    ],
)
async def test_only_loopback_peers_change_things_but_for_the_admin_listener(door, peer, may):
    context = SimpleNamespace(peer=lambda: peer)
    for trusts in (False, True):
        service = AdminService(door.server.models, "1", trusts_all_peers=trusts)
        if may or trusts:
            await service.Drain(drain(), context)
            await service.Undrain(admin_pb2.UndrainRequest(), context)
            continue
        with pytest.raises(PermissionDeniedError):
            await service.Drain(drain(), context)
        with pytest.raises(PermissionDeniedError):
            await service.Undrain(admin_pb2.UndrainRequest(), context)


async def test_the_admin_listener_has_admin_and_health_but_no_generation():
    config = make_config(admin_listen="127.0.0.1:0")
    async with front_door(config=config) as door:
        assert door.server.admin_address != door.server.address
        async with grpc.aio.insecure_channel(door.server.admin_address) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            await admin.Drain(drain())
            await admin.Undrain(admin_pb2.UndrainRequest())
            generate = channel.unary_unary("/moe_server.v1.GenerationService/Generate")
            failed = await failure(generate(b""))
            assert failed.code == grpc.StatusCode.UNIMPLEMENTED
