"""A tiny Mixtral and a tiny dense Mistral in one server, with real engines and over real gRPC."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import RetryInfo

from moe_server.config import load_config
from moe_server.patience import Patience
from moe_server.planned_models import plan_models
from moe_server.proto.moe_server.v1 import admin_pb2, generation_pb2
from moe_server.service.running_model import ModelSetup
from moe_server.service.served_model import ServedModel
from moe_server.state import ServerState
from moe_server.supervisor import ENGINE_COMMAND
from tests.front_door import FrontDoor, failure, front_door, request
from tests.test_architectures import write
from tests.tiny import Answer, Tiny, transformers_answers

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOAD_S = 180.0
"""Two engines import torch side by side, maybe on a busy machine."""
PROMPTS = {
    "mixtral": [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8] * 20],
    "mistral": [[2, 7, 1], [8, 2, 8, 1, 8, 2, 8, 4], [6] * 20],
}
NEW_TOKENS = 24
LONG = 450

CONFIG = """
model = "{mixtral}"
model_name = "mixtral"
listen = "127.0.0.1:0"
device_memory = "min"
host_memory = 200000
dense_backend = "resident"
threads = 1
max_total_tokens = 2048
[warmup]
batch = 2
probes = 1

[[models]]
model = "{mistral}"
model_name = "mistral"
device_memory = "64MiB"
dense_backend = "resident"
threads = 1
max_total_tokens = 2048
warmup = {{batch = 1, probes = 1}}
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("side-by-side")
    return {
        "mixtral": Tiny(seed=3).write(folder / "mixtral"),
        "mistral": write("mistral", folder / "mistral"),
    }


@pytest.fixture(scope="module")
def alone(paths) -> dict[str, list[Answer]]:
    """What transformers says, one model and one prompt at a time."""
    return {
        name: transformers_answers(path, PROMPTS[name], NEW_TOKENS) for name, path in paths.items()
    }


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door(paths, tmp_path_factory) -> AsyncIterator[FrontDoor]:
    file = tmp_path_factory.mktemp("config") / "server.toml"
    file.write_text(CONFIG.format(**paths))
    config = load_config(file, environ={})
    mixtral, mistral = (
        ModelSetup(
            planned.config,
            ServedModel.of(planned.config, planned.checkpoint, planned.plan, None),
            Patience(),
        )
        for planned in plan_models(config)
    )
    async with front_door(
        config=config.model_copy(update={"device_memory": mixtral.config.device_memory}),
        model=mixtral.model,
        patience=Patience(),
        command=ENGINE_COMMAND,
        beside=[mistral],
        until=ServerState.STARTING,
    ) as door:
        await ready(door)
        yield door


async def ready(door: FrontDoor) -> None:
    await asyncio.wait_for(door.server.models.feed.wait_for(ServerState.READY), LOAD_S)


async def answer(door: FrontDoor, name: str, prompt: list[int], num_tokens=NEW_TOKENS) -> list[int]:
    asked = request(
        prompt,
        generation_pb2.GenerateRequest,
        model=name,
        max_new_tokens=num_tokens,
        ignore_eos=True,
    )
    return list((await door.generation.Generate(asked)).token_ids)


async def answers(door: FrontDoor) -> dict[str, list[list[int]]]:
    """All prompts of both models at once."""
    asked = [(name, prompt) for name, prompts in PROMPTS.items() for prompt in prompts]
    told = await asyncio.gather(*(answer(door, name, prompt) for name, prompt in asked))
    by_name: dict[str, list[list[int]]] = {name: [] for name in PROMPTS}
    for (name, _), tokens in zip(asked, told, strict=True):
        by_name[name].append(tokens)
    return by_name


async def test_side_by_side_both_answer_what_they_answer_alone(door, alone):
    told = await answers(door)
    for name, expected in alone.items():
        assert told[name] == [one.token_ids for one in expected]


async def test_each_keeps_its_own_budget(door):
    status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
    mixtral, mistral = status.models
    assert (mixtral.memory.expert_slots, mixtral.memory.experts) == (1, 16)
    assert mixtral.memory.host_records > 0
    assert mixtral.experts.disk_reads > 0
    assert mistral.memory.device_budget_bytes == 64 * 2**20
    assert mistral.memory.experts == mistral.experts.disk_reads == mistral.memory.host_records == 0


@pytest.mark.parametrize(("victim", "other"), [("mixtral", "mistral"), ("mistral", "mixtral")])
async def test_an_engine_is_killed_while_the_other_one_streams_on(door, alone, victim, other):
    expected = await answer(door, other, PROMPTS[other][0], LONG)
    streams = {
        name: aiter(
            door.generation.GenerateStream(
                request(PROMPTS[name][0], model=name, max_new_tokens=LONG, ignore_eos=True)
            )
        )
        for name in (victim, other)
    }
    tokens = []
    for stream in streams.values():
        await anext(stream)
    os.kill(door.server.models.find(victim).supervisor.engine_pid, signal.SIGKILL)
    failed, _ = await asyncio.gather(failure(streams[victim]), _read(streams[other], tokens))
    assert failed.code == grpc.StatusCode.UNAVAILABLE
    assert isinstance(failed.details[0], RetryInfo)
    assert tokens == expected
    await ready(door)
    assert await answers(door) == {
        name: [one.token_ids for one in expected] for name, expected in alone.items()
    }


async def _read(stream, tokens: list[int]) -> None:
    async for event in stream:
        tokens += event.delta.token_ids
