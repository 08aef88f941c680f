"""Requests recorded from one server, by the command, and sent again by the next one's warm-up."""

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from google.protobuf.descriptor import FieldDescriptor

from moe_server.cli import cli
from moe_server.client import Client
from moe_server.config import WarmupConfig
from moe_server.proto.moe_server.v1 import admin_pb2
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.warmup.recorded import read_requests
from tests.front_door import (
    ANY_TIME,
    eventually,
    failure,
    front_door,
    make_config,
    request,
    setup,
)


def config(recording: str):
    warmup = WarmupConfig(prompt_tokens=2, batch=2, probes=2, recording=recording, **ANY_TIME)
    return make_config(warmup=warmup)


async def record(door, tmp_path, count: int, *flags: str, sends: int):
    """Runs the command while `sends` requests are sent; returns its result and its file."""
    recorder = door.server.models.find("").recorder
    await eventually(lambda: not recorder._listeners)
    out = tmp_path / "requests.jsonl"
    command = ["warmup", "record", "--target", door.server.address, "--out", str(out)]
    running = asyncio.create_task(
        asyncio.to_thread(CliRunner().invoke, cli, [*command, "--count", str(count), *flags])
    )
    await eventually(lambda: bool(recorder._listeners) or running.done())
    for number in range(sends):
        asked = request(
            "secret words", max_new_tokens=3, seed=number, temperature=0.5, stop_sequences=["word"]
        )
        async for _ in door.generation.GenerateStream(asked):
            pass
    return await running, out


async def test_shapes_have_lengths_and_no_words(tmp_path):
    async with front_door(config=config("shapes")) as door:
        result, out = await record(door, tmp_path, 2, sends=3)
        assert result.exit_code == 0, result.output
        assert f"recorded 2 of 2 requests: {out}" in result.output
        content = out.read_text()
        assert "secret" not in content
        assert "word" not in content
        assert out.stat().st_mode & 0o077 == 0
        for number, recorded in enumerate(read_requests(out)):
            assert recorded.random_prompt.tokens == len("secret words")
            assert recorded.request.sampling.seed == number
            assert recorded.request.stopping.max_new_tokens == 3
            assert recorded.request.model == "demo"


def test_sampling_has_no_place_for_words():
    kinds = {field.cpp_type for field in pb.Sampling.DESCRIPTOR.fields}
    assert not kinds & {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE}


async def test_text_is_recorded_where_the_configuration_says_so_and_sent_again(tmp_path):
    async with front_door(config=config("text")) as door:
        result, out = await record(door, tmp_path, 1, sends=1)
        assert result.exit_code == 0, result.output
        [recorded] = read_requests(out)
        assert recorded.request.text == "secret words"
        assert list(recorded.request.stopping.stop_sequences) == ["word"]
    again = dataclasses.replace(
        setup(config=config("off")), requests=[recorded, refused("demo"), refused("other")]
    )
    async with front_door(beside=[], config=config("off"), first=again) as door:
        stages = door.server.supervisor.startup.stages.stages
        [sent] = [stage for stage in stages if stage.name == "recorded requests"]
        assert [stage.name for stage in stages][-3:] == [
            "request shapes",
            "recorded requests",
            "proof",
        ]
        [warning] = sent.warnings
        assert warning.startswith("A token_ids request is refused"), "the other model's is not sent"


def refused(model: str) -> pb.RecordedRequest:
    asked = pb.GenerateStreamRequest(model=model, token_ids=pb.TokenIds(ids=[10**6]))
    return pb.RecordedRequest(request=asked)


async def test_nothing_is_recorded_without_consent(tmp_path):
    async with front_door(config=config("off")) as door:
        result, out = await record(door, tmp_path, 1, sends=1)
        assert result.exit_code == 2
        assert "warmup.recording" in result.output
        assert not out.exists()


async def test_what_came_in_time_is_kept_and_nothing_at_all_is_an_error(tmp_path):
    async with front_door(config=config("text")) as door:
        result, out = await record(door, tmp_path, 5, "--timeout", "0.5", sends=0)
        assert result.exit_code == 2
        assert "No request came within 0.5 s" in result.output
        assert not out.exists()
        result, out = await record(door, tmp_path, 5, "--timeout", "6", sends=1)
        assert result.exit_code == 0, result.output
        assert len(read_requests(out)) == 1
        result, out = await record(door, tmp_path, 5, sends=0)
        assert result.exit_code == 2
        assert "exists" in result.output
        assert len(read_requests(out)) == 1


def test_an_interrupt_tells_what_is_kept(tmp_path, monkeypatch):
    def record_requests(*_) -> Iterator[str]:
        yield "{}"
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "record_requests", record_requests)
    out = tmp_path / "requests.jsonl"
    result = CliRunner().invoke(cli, ["warmup", "record", "--target", "unix:no", "--out", str(out)])
    assert result.exit_code == 130
    assert f"recorded 1 of 50 requests: {out}" in result.output
    assert out.read_text() == "{}\n"


async def test_the_call_itself_is_checked():
    async with front_door(config=config("text")) as door:
        ask = admin_pb2.RecordRequestsRequest
        failed = await failure(door.admin.RecordRequests(ask(count=0)))
        assert "count is 0" in failed.message
        failed = await failure(door.admin.RecordRequests(ask(count=1, model="none")))
        assert "no model 'none'" in failed.message
        calls = [door.admin.RecordRequests(ask(count=1)) for _ in range(4)]
        for call in calls:
            await call.initial_metadata()
        failed = await failure(door.admin.RecordRequests(ask(count=1)))
        assert "record already" in failed.message
        for call in calls:
            call.cancel()
        recorder = door.server.models.find("").recorder
        await eventually(lambda: not recorder._listeners)


@pytest.mark.parametrize("arguments", [["warmup"], ["warmup", "record"]])
def test_a_target_is_required(arguments):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "Missing option '--target'" in result.output


def test_what_lies_where_the_file_would_be_is_left_alone(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "nowhere" / "file")
    for out, problem in ((file, "exists"), (link, "exists"), (file / "below", "Not a directory")):
        command = ["warmup", "record", "--target", "127.0.0.1:1", "--out", str(out)]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 2
        assert problem in result.output
    assert file.exists()
    assert link.is_symlink()
