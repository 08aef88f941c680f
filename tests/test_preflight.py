"""What a start is checked for, and files that it waits for."""

import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_server import preflight
from moe_server.client import Client, UnreachableError
from moe_server.commands.serve import _prepare
from moe_server.config import load_config
from moe_server.errors import MoeServerError, Reason
from moe_server.planned_models import plan_models
from moe_server.proto.moe_server.v1 import admin_pb2 as pb
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.startup import Startup
from moe_server.warmup.recorded import to_line
from moe_server.warmup.stages import PREFLIGHT
from tests.front_door import eventually

DEMO = Path(preflight.__file__).parent / "demo"


def planned(**keys):
    return plan_models(load_config(flags=keys, environ={}))[0]


def lacking(reason: Reason = Reason.UNAVAILABLE) -> MoeServerError:
    return MoeServerError("A shard is missing.", "Bring it.", reason=reason)


def test_our_own_requirements_are_met():
    assert preflight.unmet_requirements() == []


def test_missing_and_wrong_versions_are_named(monkeypatch):
    required = ["numpy>=2", "torch>=99", "no-such-library>=1", "bench-only; extra == 'bench'"]
    monkeypatch.setattr(metadata, "requires", lambda _: required)
    torch, missing = preflight.unmet_requirements()
    assert torch == f"torch is {metadata.version('torch')}, not >=99"
    assert missing == "no-such-library is not installed"
    with pytest.raises(MoeServerError, match="not >=99") as caught:
        preflight.check(load_config(environ={}))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_files_that_refuse_o_direct_are_warned_of(monkeypatch):
    assert list(preflight.warnings(planned())) == []
    monkeypatch.setattr(preflight, "takes_o_direct", lambda _: False)
    [warning] = preflight.warnings(planned())
    assert "refuse O_DIRECT" in warning
    assert "model.safetensors" in warning


def test_a_memlock_limit_below_the_records_is_warned_of(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**16, 2**16))
    assert list(preflight.warnings(planned())) == []  # nothing is pinned on a CPU
    on_gpu = planned(device="cuda", device_memory="40MiB", host_memory="20MiB")
    [warning] = preflight.warnings(on_gpu)
    assert warning.startswith("The memlock limit is 64.00 KiB")


def test_little_room_for_the_hot_set_is_warned_of(monkeypatch, tmp_path):
    asked = []

    def usage(folder: Path):
        asked.append(folder)
        return SimpleNamespace(free=2**20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    file = tmp_path / "to come" / "hot.json"
    [warning] = preflight.warnings(planned(**{"warmup.hot_set": str(file)}))
    assert warning.startswith("Only 1.00 MiB are free where the hot set")
    assert asked == [tmp_path]
    assert list(preflight.warnings(planned(**{"warmup.hot_set": "off"}))) == []


@pytest.mark.parametrize(("name", "is_told"), [("other", True), ("demo", False), ("", False)])
def test_recorded_requests_of_another_model_are_warned_of(tmp_path, name, is_told):
    asked = generation_pb2.GenerateStreamRequest(model=name, text="a")
    file = tmp_path / "requests.jsonl"
    file.write_text(to_line(generation_pb2.RecordedRequest(request=asked)))
    startup = Startup("demo")
    _prepare(load_config(flags={"warmup.requests": str(file)}, environ={}), [startup])
    [preflight_stage] = startup.stages.stages
    told = any("this model, 'demo'; they are to 'other'" in one for one in preflight_stage.warnings)
    assert told is is_told


async def test_a_file_is_waited_for_and_the_waiting_is_told(monkeypatch):
    monkeypatch.setattr(preflight, "FIRST_BACKOFF_S", 0.01)
    startup = Startup("demo")
    told = []

    def prepare() -> str:
        startup.stages.enter(PREFLIGHT)
        if len(told) < 3:
            told.append(startup.stages.stages[0].failure)
            raise lacking()
        return "setups"

    assert await preflight.wait(prepare, [startup]) == "setups"
    assert told == ["", *["A shard is missing. Bring it."] * 2]
    [stage] = startup.stages.stages
    assert stage.attempts == 4


async def test_what_does_not_pass_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(preflight, "FIRST_BACKOFF_S", 0.01)
    startup = Startup("demo")
    reasons = [Reason.UNSUPPORTED, Reason.UNAVAILABLE]

    def prepare() -> None:
        startup.stages.enter(PREFLIGHT)
        raise lacking(reasons.pop())

    with pytest.raises(MoeServerError) as caught:
        await preflight.wait(prepare, [startup])
    assert caught.value.reason is Reason.UNSUPPORTED
    assert startup.stages.stages[0].attempts == 2


def serve(model: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "moe_server", "serve", "--model", str(model), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def incomplete(tmp_path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "model.safetensors").rename(tmp_path / "aside")
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


async def test_serve_answers_while_a_shard_is_missing_and_serves_when_it_came(incomplete):
    address = f"unix:{incomplete.parent / 'socket'}"
    process = serve(incomplete, "--listen", address)
    try:
        with Client(address) as client:

            def status() -> pb.GetServerStatusResponse | None:
                try:
                    return client.status()
                except UnreachableError:
                    return None

            await eventually(lambda: status() is not None)
            told = status()
            assert told.state == pb.SERVER_STATE_STARTING
            [model] = told.models
            assert "model.safetensors is missing" in model.startup.stages[0].failure
            with pytest.raises(MoeServerError, match="No checkpoint has been read yet"):
                client.models()
            (incomplete.parent / "aside").replace(incomplete / "model.safetensors")
            await eventually(lambda: status().state == pb.SERVER_STATE_READY)
            assert [model.name for model in client.models()] == ["model"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
        process.stderr.close()


async def test_serve_answers_and_can_be_ended_while_the_volume_hangs(incomplete):
    os.mkfifo(incomplete / "model.safetensors")  # Nobody writes: opening it never returns.
    address = f"unix:{incomplete.parent / 'socket'}"
    process = serve(incomplete, "--listen", address)
    try:
        with Client(address) as client:

            def is_at_it() -> bool:
                try:
                    stages = client.status().models[0].startup.stages
                except UnreachableError:
                    return False
                return [stage.state for stage in stages] == [pb.STAGE_STATE_RUNNING]

            await eventually(is_at_it)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def test_serve_ends_when_what_came_cannot_be_served(incomplete):
    process = serve(incomplete, "--listen", "127.0.0.1:0")
    try:
        while "waiting" not in (line := await asyncio.to_thread(process.stderr.readline)):
            assert line, "it ended"
        (incomplete / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        _, said = await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 2
        assert "error: " in said
        assert "embed_tokens.weight is in none" in said
    finally:
        if process.poll() is None:
            process.kill()
