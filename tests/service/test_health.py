import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import ResourceInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_server.service import health
from moe_server.state import ServerState, StateFeed
from tests.front_door import eventually, failure, front_door

STATUS = health_pb2.HealthCheckResponse
GENERATION = "moe_server.v1.GenerationService"


def check(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


async def test_liveness_readiness_and_unknown_names():
    async with front_door() as door:
        stub = health_pb2_grpc.HealthStub(door.channel)
        assert (await stub.Check(check(""))).status == STATUS.SERVING
        assert (await stub.Check(check(GENERATION))).status == STATUS.SERVING
        failed = await failure(stub.Check(check("nobody")))
        assert failed.code == grpc.StatusCode.NOT_FOUND
        assert isinstance(failed.details[0], ResourceInfo)
        unknown = stub.Watch(check("nobody"))
        assert (await unknown.read()).status == STATUS.SERVICE_UNKNOWN
        await door.server.supervisor.drain()
        assert (await stub.Check(check(""))).status == STATUS.SERVING
        assert (await stub.Check(check(GENERATION))).status == STATUS.NOT_SERVING
        assert not unknown.done()


async def test_every_watcher_is_told_every_change_and_one_leaving_disturbs_nobody():
    async with front_door() as door:
        stub = health_pb2_grpc.HealthStub(door.channel)
        watchers = [stub.Watch(check(GENERATION)) for _ in range(5)]
        alive = stub.Watch(check(""))
        for watcher in (*watchers, alive):
            assert (await watcher.read()).status == STATUS.SERVING
        leaver = watchers.pop(2)
        leaver.cancel()
        await eventually(lambda: door.server.models.feed.num_watchers == 5)
        for _ in range(3):
            await door.server.supervisor.drain()
            door.server.supervisor.undrain()
        expected = [STATUS.NOT_SERVING, STATUS.SERVING] * 3
        for watcher in watchers:
            told = [(await asyncio.wait_for(watcher.read(), 5)).status for _ in expected]
            assert told == expected
        assert not alive.done()
        for watcher in (*watchers, alive):
            watcher.cancel()
        await eventually(lambda: door.server.models.feed.num_watchers == 0)


async def test_list():
    async with front_door() as door:
        listing = door.channel.unary_unary(
            "/grpc.health.v1.Health/List",
            request_serializer=health._list_message("HealthListRequest").SerializeToString,
            response_deserializer=health._list_message("HealthListResponse").FromString,
        )
        response = await listing(health._list_message("HealthListRequest")())
        assert {name: entry.status for name, entry in response.statuses.items()} == {
            "": STATUS.SERVING,
            GENERATION: STATUS.SERVING,
            f"{GENERATION}/demo": STATUS.SERVING,
        }


async def test_a_watcher_that_lags_keeps_the_newest_change():
    feed = StateFeed()
    with feed.watch() as watcher:
        for _ in range(100):
            feed.publish(ServerState.READY)
            feed.publish(ServerState.DRAINING)
        states = []
        while not states or watcher._unread:
            states.append(await watcher.next())
    assert len(states) == 64
    assert states[-1] is ServerState.DRAINING
    assert feed.num_watchers == 0


@pytest.mark.parametrize("state", ServerState)
async def test_only_ready_serves(state):
    async with front_door() as door:
        door.server.supervisor.startup.feed.publish(state)
        stub = health_pb2_grpc.HealthStub(door.channel)
        for name in (GENERATION, f"{GENERATION}/demo"):
            serving = (await stub.Check(check(name))).status == STATUS.SERVING
            assert serving == (state is ServerState.READY)
        assert (await stub.Check(check(""))).status == STATUS.SERVING
