"""A whole server, with a real engine process, whose checkpoint is damaged under it."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from google.rpc.error_details_pb2 import RetryInfo

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.patience import Patience
from moe_server.service.served_model import ServedModel
from moe_server.state import ServerState
from moe_server.supervisor import ENGINE_COMMAND
from tests.front_door import FrontDoor, eventually, failure, front_door, make_config, request
from tests.tiny import Tiny

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@asynccontextmanager
async def real_server(path: Path):
    """Paged as far as it goes: every step reads."""
    config = make_config(model=str(path), device_memory="min", threads=1)
    checkpoint = read_checkpoint(path)
    model = ServedModel.of(config, checkpoint, plan_memory(config, checkpoint), None)
    async with front_door(
        config=config, model=model, patience=Patience(proof_again_s=0.1), command=ENGINE_COMMAND
    ) as door:
        yield door


async def answer(door: FrontDoor) -> list[int]:
    tokens: list[int] = []
    call = door.generation.GenerateStream(request(PROMPT, max_new_tokens=8, ignore_eos=True))
    async for message in call:
        tokens += message.delta.token_ids
    return tokens


async def test_shards_truncated_under_the_server_fail_requests_until_they_are_back(tmp_path):
    path = Tiny(dtype="bfloat16", seed=50, vocab=100).write(tmp_path / "model")
    [shard] = path.glob("*.safetensors")
    content = shard.read_bytes()
    async with real_server(path) as door:
        expected = await answer(door)
        assert len(expected) == 8
        pid = door.server.supervisor.engine_pid
        for _ in range(2):
            os.truncate(shard, 4096)
            call = door.generation.GenerateStream(request(PROMPT, max_new_tokens=8))
            failed = await failure(call)
            assert failed.code is grpc.StatusCode.UNAVAILABLE
            assert str(shard) in failed.message
            assert any(isinstance(detail, RetryInfo) for detail in failed.details)
            # READY was proven; what is in doubt is proven anew, and cannot be now.
            await door.reach(ServerState.WARMING)
            stages = door.server.supervisor.startup.stages.stages
            await eventually(lambda stages=stages: str(shard) in stages[-1].failure)
            with shard.open("r+b") as stream:
                stream.write(content)
            await door.reach(ServerState.READY)
            assert await answer(door) == expected
        # The same process all along.
        assert door.server.supervisor.engine_pid == pid
        assert door.server.supervisor.num_restarts == 0
