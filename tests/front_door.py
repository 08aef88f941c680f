"""A front door with a fake engine behind it, for tests of the services, the warm-up and the CLI."""

import asyncio
import dataclasses
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from moe_server.budget import plan_memory
from moe_server.chat.template import ChatTemplate
from moe_server.chat.template_chat import TemplateChat
from moe_server.checkpoint import read_checkpoint
from moe_server.config import Config, SchedulerConfig, WarmupConfig
from moe_server.patience import Patience
from moe_server.proto.moe_server.v1 import (
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
)
from moe_server.service.running_model import ModelSetup
from moe_server.service.served_model import ServedModel
from moe_server.service.server import Server
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.supervisor import Supervisor
from moe_server.tokenizer import SpecialTokens, Tokenizer
from moe_server.warmup.warm_up import WarmUp

FAKE_ENGINE = (sys.executable, "-m", "tests.fake_engine")
PATIENCE = Patience(first_backoff_s=0.02, longest_backoff_s=0.1, shutdown_s=2.0, proof_again_s=0.1)
WAIT_S = 60.0
ANY_TIME = {"max_ttft_ms": math.inf, "max_tpot_ms": math.inf, "text": False}
"""Warm-ups of tests that are about something else."""
VOCAB = 100
EOS = 99
E_ACUTE = (27, 28)
"""The two tokens whose bytes make one character."""


def letters_tokenizer() -> Tokenizer:
    """0..25 are letters, 26 is a space, 27 and 28 the halves of an "é", 99 is special."""
    token_bytes = [bytes([97 + i]) for i in range(26)] + [b" ", b"\xc3", b"\xa9"]
    token_bytes += [f"<{i}>".encode() for i in range(29, 99)] + [b""]

    def encode(text: str) -> list[int]:
        return [26 if char == " " else ord(char) - 97 for char in text]

    def encode_sections(sections: Sequence[str | int], _max_tokens: int) -> list[int]:
        parts = [[part] if isinstance(part, int) else encode(part) for part in sections]
        return list(chain.from_iterable(parts))

    return Tokenizer(
        lambda text, _: encode(text),
        token_bytes,
        adds_leading_space=False,
        special=SpecialTokens({"</s>": EOS}, encode_sections),
    )


def letters_chat(template: str = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"):
    return TemplateChat(ChatTemplate(template, "here", {}), letters_tokenizer())


def make_config(**changes: object) -> Config:
    defaults = {
        "listen": "127.0.0.1:0",
        "warmup": WarmupConfig(prompt_tokens=2, batch=2, probes=2, **ANY_TIME),
    }
    return Config(**{**defaults, **changes})


def make_model(*, has_tokenizer: bool = True, max_request_tokens: int = 64, **changes: object):
    demo = Config()
    checkpoint = read_checkpoint(demo.model_path)
    memory = dataclasses.replace(
        plan_memory(demo, checkpoint),
        max_request_tokens=max_request_tokens,
        embedding_on_disk_bytes=54_321,
    )
    tokenizer = letters_tokenizer() if has_tokenizer else None
    model = ServedModel.of(demo, checkpoint, memory, tokenizer)
    facts = {"vocab_size": VOCAB, "eos_token_ids": (EOS,), "default_max_new_tokens": 8}
    return dataclasses.replace(model, **{**facts, **changes})


def small_queue(limit: int) -> SchedulerConfig:
    return SchedulerConfig(max_running=1, max_waiting=limit - 1)


class ShortServer(Server):
    """A server whose first model's parts have short names."""

    @property
    def supervisor(self) -> Supervisor:
        return self.models.find("").supervisor

    @property
    def warm_up(self) -> WarmUp:
        return self.models.find("").warm_up


@dataclass
class FrontDoor:
    """A running server and a client's view of it."""

    server: ShortServer
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.scoring = generation_pb2_grpc.ScoringServiceStub(self.channel)
        self.tokenizer = generation_pb2_grpc.TokenizerServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    async def reach(self, *states: ServerState) -> ServerState:
        waiting = self.server.models.feed.wait_for(*states)
        return await asyncio.wait_for(waiting, WAIT_S)

    @property
    def num_cancels(self) -> int:
        return self.server.supervisor.load.blocks_used

    @property
    def num_submits(self) -> int:
        return self.server.supervisor.load.blocks_total


def setup(
    *engine_flags: str,
    config: Config | None = None,
    model: ServedModel | None = None,
    patience: Patience = PATIENCE,
    command: Sequence[str] = FAKE_ENGINE,
) -> ModelSetup:
    """What one model is run with; of `config` what concerns a model."""
    [own, *_] = (config or make_config()).all_models
    return ModelSetup(own, model or make_model(), patience, (*command, *engine_flags))


@asynccontextmanager
async def front_door(
    *engine_flags: str,
    config: Config | None = None,
    model: ServedModel | None = None,
    patience: Patience = PATIENCE,
    until: ServerState = ServerState.READY,
    command: Sequence[str] = FAKE_ENGINE,
    beside: Sequence[ModelSetup] = (),
    first: ModelSetup | None = None,
) -> AsyncIterator[FrontDoor]:
    """A server of one model, and of those `beside` it."""
    config = config or make_config()
    first = first or setup(
        *engine_flags, config=config, model=model, patience=patience, command=command
    )
    setups = [first, *beside]
    server = ShortServer(config, [Startup(setup.model.name) for setup in setups])
    await server.open()
    try:
        server.models.start(setups)
        async with grpc.aio.insecure_channel(server.address) as channel:
            door = FrontDoor(server, channel)
            await door.reach(until)
            yield door
    finally:
        await server.shut_down(grace_s=0)


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what another process reports; fails after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        await asyncio.sleep(0.01)


def set_prompt(made, prompt: str | list[int] | list[tuple[str, str]] | None) -> None:
    """Text, token ids or messages: a role and a content each."""
    if isinstance(prompt, str):
        made.text = prompt
    elif prompt and isinstance(prompt[0], tuple):
        for role, content in prompt:
            made.messages.messages.add(role=role, content=content)
    elif prompt is not None:
        made.token_ids.ids.extend(prompt)


def request(
    prompt: str | list[int] | list[tuple[str, str]] | None,
    kind=generation_pb2.GenerateStreamRequest,
    model: str = "",
    **options,
):
    """`options` are fields of the request, of sampling, stopping and output, told apart by name."""
    made = kind(model=model)
    set_prompt(made, prompt)
    choices = options.pop("choices", None)
    if choices is not None:
        made.choices.SetInParent()
        made.choices.values.extend(choices)
    for name, value in options.items():
        for section in (made, made.sampling, made.stopping, made.output):
            if name in section.DESCRIPTOR.fields_by_name:
                if isinstance(value, list):
                    getattr(section, name).extend(value)
                else:
                    setattr(section, name, value)
    return made


@dataclass
class Failure:
    code: grpc.StatusCode
    message: str
    details: list


async def failure(call: Awaitable | AsyncIterator) -> Failure:
    """How an RPC failed, its details unpacked."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("the call succeeded")


def failure_of(error: grpc.RpcError) -> Failure:
    details = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in Status.FromString(value).details:
                kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
                detail = kind()
                packed.Unpack(detail)
                details.append(detail)
    return Failure(error.code(), error.details(), details)
