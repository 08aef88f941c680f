"""The Python client where the commands do not use it: decoded schemas, several samples."""

import asyncio

import pytest
import pytest_asyncio

from moe_server.client import Client
from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from tests.front_door import front_door, make_config

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door() as door:
        yield door


async def events(door, **options) -> list[pb.GenerateStreamResponse]:
    def gather():
        with Client(door.server.address) as client:
            return list(client.generate_stream("a", **options))

    return await asyncio.to_thread(gather)


async def test_a_schema_may_be_given_decoded(door):
    stopping = pb.Stopping(max_new_tokens=2)
    got = await events(door, json_schema={"const": True}, stopping=stopping)
    assert got[-1].finished.usage.completion_tokens == 2
    # The vocabulary of these tests has no digits.
    with pytest.raises(MoeServerError, match="no text of this model") as caught:
        await events(door, json_schema={"const": 1})
    assert caught.value.field == "json_schema"


async def test_only_one_constraint(door):
    with pytest.raises(MoeServerError, match="At most one"):
        await events(door, regex="a", choices=["a"])
    with pytest.raises(MoeServerError, match="0 choices"):
        await events(door, choices=[])


async def test_several_samples(door):
    sampling = pb.Sampling(temperature=1.0, num_samples=2, seed=3)
    got = await events(door, sampling=sampling, stopping=pb.Stopping(max_new_tokens=3))
    texts = ["", ""]
    for event in got:
        texts[event.delta.index] += event.delta.text
    assert texts == ["bcd", "bcd"]


async def test_a_request_that_grpc_refuses_says_what_to_do():
    config = make_config(service={"max_message_bytes": 100})
    async with front_door(config=config) as door:
        with pytest.raises(MoeServerError, match=r"larger than max.*service\.max_message_bytes"):
            await events(door, regex="a" * 200)
