"""The tokenizer service: 0..25 are letters, 26 is a space, 99 is special."""

import threading

import grpc
import pytest
import pytest_asyncio

from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.prompts import MAX_INLINE_CHARS
from moe_server.service.tokenizer import MAX_AT_ONCE
from moe_server.state import ServerState
from moe_server.tokenizer import Tokenizer
from tests.front_door import WAIT_S, failure, front_door, letters_chat, make_model
from tests.front_door import request as make

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door(model=make_model(chat=letters_chat())) as door:
        yield door


def prompt(given):
    return make(given, pb.TokenizeRequest)


async def test_it_tokenises_text_and_messages(door):
    response = await door.tokenizer.Tokenize(prompt("ab c"))
    assert list(response.token_ids) == [0, 1, 26, 2]
    response = await door.tokenizer.Tokenize(prompt([("user", "a"), ("assistant", "b")]))
    assert list(response.token_ids) == [0, 99, 1, 99]


async def test_it_detokenises(door):
    ids = [27, 28, 0, 99, 26, 1, 27]
    response = await door.tokenizer.Detokenize(pb.DetokenizeRequest(token_ids=ids))
    assert response.text == "\u00e9a b\ufffd"


REFUSALS = [
    (prompt(None), "prompt", "no prompt"),
    (prompt(""), "text", "empty"),
    (prompt("a" * 100_000), "prompt", "63 tokens"),
    (prompt([("tool", "a")]), "messages.messages[0].role", "'tool'; expected one of system, user"),
    (prompt([("user", "a")] * 1025), "messages.messages", "1025 messages"),
    (pb.TokenizeRequest(messages=pb.Messages()), "messages.messages", "0 messages"),
    (pb.TokenizeRequest(model="x", text="a"), "model", "'x'"),
]


@pytest.mark.parametrize(("request_", "field", "message"), REFUSALS)
async def test_it_refuses_what_generation_would(door, request_, field, message):
    failed = await failure(door.tokenizer.Tokenize(request_))
    assert message in failed.message
    if field == "model":
        assert failed.code == grpc.StatusCode.NOT_FOUND
    else:
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failed.details[0].field_violations[0].field == field


async def test_a_template_s_refusal_is_the_caller_s_fault():
    chat = letters_chat("{{ raise_exception('Only cats.') }}")
    async with front_door(model=make_model(chat=chat)) as door:
        failed = await failure(door.tokenizer.Tokenize(prompt([("user", "a")])))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failed.details[0].field_violations[0].field == "messages"
    assert "Only cats." in failed.message


async def test_calls_are_bounded_and_hold_up_no_generation():
    go = threading.Event()

    def encode(text: str, _max_tokens: int) -> list[int]:
        if len(text) > MAX_INLINE_CHARS and not text.endswith("b"):
            go.wait(WAIT_S)
        return [len(text) % 50]

    tokenizer = Tokenizer(encode, [b"x" * 1000] * 100, adds_leading_space=False)
    async with front_door(model=make_model(tokenizer=tokenizer)) as door:
        long_text = "a" * (MAX_INLINE_CHARS + 1)
        calls = [door.tokenizer.Tokenize(prompt(long_text)) for _ in range(MAX_AT_ONCE)]
        while True:
            late = door.tokenizer.Tokenize(prompt("a"))
            if await late.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                break
        failed = await failure(door.tokenizer.Tokenize(prompt("a")))
        assert failed.details[0].retry_delay.seconds > 0
        request = make(long_text[1:] + "b", pb.GenerateRequest, max_new_tokens=1)
        assert list((await door.generation.Generate(request)).token_ids) == [2]
        go.set()
        for call in calls:
            assert list((await call).token_ids) == [1]


async def test_too_many_ids_are_refused(door):
    failed = await failure(door.tokenizer.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 65)))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "65 token ids; at most 64" in failed.message


async def test_without_a_tokenizer_there_is_no_text():
    async with front_door(model=make_model(has_tokenizer=False), until=ServerState.LOADING) as door:
        for call in (
            door.tokenizer.Tokenize(prompt("a")),
            door.tokenizer.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
        ):
            failed = await failure(call)
            assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
            assert "no tokenizer" in failed.message
