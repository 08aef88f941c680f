"""Several models behind one front door, with fake engines: who is found, told, lost, drained."""

import asyncio
import os
import signal

import grpc
import pytest
from google.rpc.error_details_pb2 import ResourceInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_server.config import WarmupConfig
from moe_server.proto.moe_server.v1 import admin_pb2, generation_pb2, model_pb2
from moe_server.service import health
from moe_server.service.running_model import ModelSetup
from moe_server.state import ServerState
from tests.front_door import (
    ANY_TIME,
    WAIT_S,
    FrontDoor,
    eventually,
    failure,
    front_door,
    make_config,
    make_model,
    request,
    setup,
)

STATUS = health_pb2.HealthCheckResponse
GENERATION = "moe_server.v1.GenerationService"


def light(*engine_flags: str, **model) -> ModelSetup:
    """A model beside "demo" that gives other tokens: of its vocabulary of 7."""
    model = make_model(name="light", **{"vocab_size": 7, "eos_token_ids": (), **model})
    config = make_config(
        model_name="light",
        warmup=WarmupConfig(prompt_tokens=2, new_tokens=3, batch=1, probes=1, **ANY_TIME),
    )
    return setup("--vocab", "7", *engine_flags, config=config, model=model)


async def tokens(door: FrontDoor, model: str, **options) -> list[int]:
    asked = request([5], generation_pb2.GenerateRequest, model=model, max_new_tokens=3, **options)
    response = await door.generation.Generate(asked)
    assert response.model == (model or "demo")
    return list(response.token_ids)


async def state_of(door: FrontDoor, model: str) -> admin_pb2.ModelStatus:
    status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
    [told] = [one for one in status.models if one.name == model]
    return told


def check(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


async def reach(door: FrontDoor, model: str, *states: ServerState) -> ServerState:
    feed = door.server.models.find(model).startup.feed
    return await asyncio.wait_for(feed.wait_for(*states), WAIT_S)


async def test_a_request_gets_the_model_it_names_and_without_a_name_the_first():
    async with front_door(beside=[light()]) as door:
        assert await tokens(door, "demo") == [6, 7, 8]
        assert await tokens(door, "light") == [6, 0, 1]
        assert await tokens(door, "") == [6, 7, 8]
        listed = (await door.models.ListModels(model_pb2.ListModelsRequest())).models
        assert [(model.name, model.vocab_size) for model in listed] == [("demo", 100), ("light", 7)]
        for name, vocab_size in (("", 100), ("light", 7)):
            got = await door.models.GetModel(model_pb2.GetModelRequest(name=name))
            assert got.model.vocab_size == vocab_size
        # What is refused is refused by the facts of the model that is meant.
        failed = await failure(door.generation.GenerateStream(request([7], model="light")))
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "vocabulary of 7" in failed.message


async def test_an_unknown_name_is_told_which_there_are():
    async with front_door(beside=[light()]) as door:
        for call in (
            door.generation.GenerateStream(request([1], model="heavy")),
            door.models.GetModel(model_pb2.GetModelRequest(name="heavy")),
        ):
            failed = await failure(call)
            assert failed.code == grpc.StatusCode.NOT_FOUND
            [info] = failed.details
            assert isinstance(info, ResourceInfo)
            assert (info.resource_type, info.resource_name) == ("model", "heavy")
            assert "'demo', 'light'" in info.description


def reading_calls(door: FrontDoor, model: str) -> list:
    """A call of each method that reads a prompt without generating."""
    ids, score = generation_pb2.TokenIds(ids=[5]), generation_pb2.ScoreRequest(model=model)
    score.token_ids.ids.append(5)
    score.continuations.add(token_ids=ids)
    text = {"model": model, "text": "a"}
    return [
        door.scoring.Score(score),
        door.scoring.Embed(generation_pb2.EmbedRequest(model=model, token_ids=ids)),
        door.scoring.Classify(generation_pb2.ClassifyRequest(**text, labels=["b", "c"])),
        door.tokenizer.Tokenize(generation_pb2.TokenizeRequest(**text)),
        door.tokenizer.Detokenize(generation_pb2.DetokenizeRequest(model=model, token_ids=[5])),
    ]


async def test_what_reads_prompts_takes_the_model_it_names_too():
    async with front_door(beside=[light(tokenizer=None)]) as door:
        answers = [await call for call in reading_calls(door, "")]
        assert [answer.model for answer in answers[:3]] == ["demo"] * 3
        score, embed, *of_text = reading_calls(door, "light")
        assert ((await score).model, (await embed).model) == ("light", "light")
        for call in of_text:
            failed = await failure(call)
            assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
            assert "Model 'light' has no tokenizer" in failed.message
        for call in reading_calls(door, "heavy"):
            failed = await failure(call)
            assert failed.code == grpc.StatusCode.NOT_FOUND
            assert "'demo', 'light'" in failed.details[0].description


async def test_request_ids_of_two_models_differ():
    async with front_door(beside=[light()]) as door:
        ids = set()
        for model in ("demo", "light"):
            asked = request([1], generation_pb2.GenerateRequest, model=model, max_new_tokens=1)
            ids.add((await door.generation.Generate(asked)).request_id)
        assert len(ids) == 2


async def test_each_model_proves_itself_with_its_own_requests():
    async with front_door(beside=[light()]) as door:
        demo, other = (running.warm_up.probes for running in door.server.models)
        assert [probe.completion_tokens for probe in demo] == [2, 2]
        assert [probe.completion_tokens for probe in other] == [3]


async def test_first_warm_ups_wait_until_every_model_has_loaded(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    until = ServerState.LOADING
    async with front_door("--gate", str(gate), beside=[light()], until=until) as door:
        await reach(door, "light", ServerState.WARMING)
        waiting = "waiting for other models to load or warm up"
        await eventually(lambda: door.server.models.find("light").startup.stages.doing == waiting)
        told = await state_of(door, "light")
        assert told.startup.stage == waiting
        assert not told.startup.probes
        await asyncio.to_thread(gate.write_bytes, b"go")
        await door.reach(ServerState.READY)


async def test_a_model_that_cannot_be_loaded_leaves_the_other_serving():
    beside = [light("--fatal", "final")]
    async with front_door(beside=beside, until=ServerState.FAILED) as door:
        await reach(door, "demo", ServerState.READY)
        assert await tokens(door, "demo") == [6, 7, 8]
        failed = await failure(door.generation.GenerateStream(request([1], model="light")))
        assert failed.code == grpc.StatusCode.UNAVAILABLE
        assert "Model 'light' is failed. No memory. Buy some." in failed.message
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        assert status.state == admin_pb2.SERVER_STATE_FAILED
        assert status.reason == "Model 'light': No memory. Buy some."
        assert [model.state for model in status.models] == [
            admin_pb2.SERVER_STATE_READY,
            admin_pb2.SERVER_STATE_FAILED,
        ]
        assert [model.reason for model in status.models] == ["", "No memory. Buy some."]


async def test_one_that_has_to_try_again_does_not_keep_the_other_from_serving():
    beside = [light("--fatal", "retry")]
    async with front_door(beside=beside, until=ServerState.STARTING) as door:
        await reach(door, "demo", ServerState.READY)
        assert await tokens(door, "demo") == [6, 7, 8]


async def test_an_engine_that_is_killed_takes_only_its_own_requests_along():
    model = make_model(max_request_tokens=100_000)
    beside = [light("--step-s", "0.01", max_request_tokens=100_000)]
    async with front_door("--step-s", "0.01", model=model, beside=beside) as door:
        streams = {
            name: door.generation.GenerateStream(
                request([1], model=name, max_new_tokens=90_000, ignore_eos=True)
            )
            for name in ("demo", "light")
        }
        events = {name: aiter(stream) for name, stream in streams.items()}
        for stream in events.values():
            await anext(stream)
            await anext(stream)
        pids = {running.name: running.supervisor.engine_pid for running in door.server.models}
        assert len(set(pids.values())) == 2
        os.kill(pids["light"], signal.SIGKILL)
        failed = await failure(events["light"])
        assert failed.code == grpc.StatusCode.UNAVAILABLE
        assert isinstance(failed.details[0], RetryInfo)
        await reach(door, "light", ServerState.READY)
        for _ in range(3):
            assert (await anext(events["demo"])).HasField("delta")
        streams["demo"].cancel()
        assert await tokens(door, "light") == [6, 0, 1]
        restarts = [(await state_of(door, name)).engine_restarts for name in ("demo", "light")]
        assert restarts == [0, 1]
        assert door.server.supervisor.engine_pid == pids["demo"]


async def test_health_of_the_server_and_of_each_model():
    async with front_door(beside=[light()]) as door:
        stub = health_pb2_grpc.HealthStub(door.channel)
        names = {
            "all": GENERATION,
            "demo": f"{GENERATION}/demo",
            "light": f"{GENERATION}/light",
        }
        watchers = {key: stub.Watch(check(name)) for key, name in names.items()}
        for watcher in watchers.values():
            assert (await watcher.read()).status == STATUS.SERVING
        os.kill(door.server.models.find("light").supervisor.engine_pid, signal.SIGKILL)
        for key in ("light", "all"):
            told = [(await asyncio.wait_for(watchers[key].read(), WAIT_S)).status for _ in "01"]
            assert told == [STATUS.NOT_SERVING, STATUS.SERVING]
        assert (await stub.Check(check(names["demo"]))).status == STATUS.SERVING
        await door.server.models.find("light").supervisor.drain()
        listing = door.channel.unary_unary(
            "/grpc.health.v1.Health/List",
            request_serializer=health._list_message("HealthListRequest").SerializeToString,
            response_deserializer=health._list_message("HealthListResponse").FromString,
        )
        response = await listing(health._list_message("HealthListRequest")())
        assert {name: entry.status for name, entry in response.statuses.items()} == {
            "": STATUS.SERVING,
            names["all"]: STATUS.NOT_SERVING,
            names["demo"]: STATUS.SERVING,
            names["light"]: STATUS.NOT_SERVING,
        }
        # The first change that this one sees is the drain of the whole server.
        await door.server.models.drain()
        assert (await asyncio.wait_for(watchers["demo"].read(), WAIT_S)).status == (
            STATUS.NOT_SERVING
        )
        for name in (f"{GENERATION}/", f"{GENERATION}/heavy"):
            assert (await failure(stub.Check(check(name)))).code == grpc.StatusCode.NOT_FOUND


async def test_the_status_tells_every_model_and_at_the_top_the_first():
    async with front_door(beside=[light()]) as door:
        await tokens(door, "light")
        await eventually(lambda: door.server.models.find("light").supervisor.load.blocks_total > 0)
        status = await door.admin.GetServerStatus(admin_pb2.GetServerStatusRequest())
        first, second = status.models
        assert status.state == admin_pb2.SERVER_STATE_READY
        assert (first.name, second.name, status.model) == ("demo", "light", "demo")
        for field in ("startup", "memory", "experts", "offload", "load", "engine_restarts"):
            assert getattr(status, field) == getattr(first, field)
        assert second.memory.experts == make_model().memory.num_experts_total
        assert len(second.startup.probes) == 1
        assert second.load.kv_blocks_total > 0


async def test_drain_and_undrain_are_all_models():
    model = make_model(max_request_tokens=100_000)
    beside = [light("--step-s", "0.01", max_request_tokens=100_000)]
    async with front_door("--step-s", "0.01", model=model, beside=beside) as door:
        streams = [
            door.generation.GenerateStream(
                request([1], model=name, max_new_tokens=num_tokens, ignore_eos=True)
            )
            for name, num_tokens in (("demo", 30), ("light", 40), ("light", 90_000))
        ]
        for stream in streams:
            await stream.read()
        wait = admin_pb2.DrainRequest()
        assert (await door.admin.Drain(wait)).remaining_requests == 3
        for name in ("demo", "light"):
            failed = await failure(door.generation.GenerateStream(request([1], model=name)))
            assert failed.code == grpc.StatusCode.UNAVAILABLE
            assert (await state_of(door, name)).state == admin_pb2.SERVER_STATE_DRAINING
        assert door.server.models.feed.current is ServerState.DRAINING
        wait.wait.FromSeconds(3)
        assert (await door.admin.Drain(wait)).remaining_requests == 1
        await door.admin.Undrain(admin_pb2.UndrainRequest())
        assert door.server.models.feed.current is ServerState.READY
        assert await tokens(door, "light") == [6, 0, 1]
        streams[-1].cancel()


@pytest.mark.parametrize("at_once", [True, False])
async def test_closing_ends_every_engine(at_once):
    async with front_door(beside=[light()]) as door:
        pids = [running.supervisor.engine_pid for running in door.server.models]
        await door.server.models.close(at_once=at_once)
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
