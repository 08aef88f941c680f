"""The scoring service against a fake engine: the next letter has -0.25, all others -1.5."""

import math
import os
from collections.abc import Sequence

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import RetryInfo

from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.scoring import MAX_AT_ONCE
from moe_server.state import ServerState
from moe_server.tokenizer import Tokenizer
from tests.front_door import (
    EOS,
    eventually,
    failure,
    front_door,
    letters_chat,
    make_config,
    make_model,
    set_prompt,
    small_queue,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED_TOKEN = 77


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    model = make_model(chat=letters_chat())
    async with front_door("--refuse-token", str(REFUSED_TOKEN), model=model) as door:
        yield door


def score(prompt, *continuations: str | Sequence[int], **fields) -> pb.ScoreRequest:
    request = pb.ScoreRequest(**fields)
    set_prompt(request, prompt)
    for given in continuations:
        if isinstance(given, str):
            request.continuations.add(text=given)
        else:
            request.continuations.add(token_ids=pb.TokenIds(ids=given))
    return request


def classify(prompt, *labels: str, content_free=(), **fields) -> pb.ClassifyRequest:
    request = pb.ClassifyRequest(labels=labels, **fields)
    set_prompt(request, prompt)
    for one in content_free:
        set_prompt(request.content_free_prompts.add(), one)
    return request


def embed(prompt) -> pb.EmbedRequest:
    request = pb.EmbedRequest()
    set_prompt(request, prompt)
    return request


async def test_continuations_are_scored_token_by_token(door):
    response = await door.scoring.Score(score("ab", "cd", "ce", "z", [2, 3, 4]))
    assert response.model == "demo"
    first, second, third, fourth = response.scores
    assert [token.token_id for token in first.tokens] == [2, 3]
    assert [token.logprob for token in second.tokens] == [-0.25, -1.5]
    assert [token.is_greedy for token in second.tokens] == [True, False]
    assert [one.logprob for one in response.scores] == [-0.5, -1.75, -1.5, -0.75]
    assert [one.num_tokens for one in response.scores] == [2, 2, 1, 3]
    assert [one.is_greedy for one in response.scores] == [True, False, False, True]
    assert (first.num_tokens, third.num_tokens, fourth.num_tokens) == (2, 1, 3)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 8)


async def test_after_messages_comes_the_answer(door):
    response = await door.scoring.Score(score([("user", "b")], "ab", [0, 2]))
    assert [one.logprob for one in response.scores] == [-0.5, -1.75]
    assert response.usage.prompt_tokens == 2
    assert [token.token_id for token in response.scores[0].tokens] == [0, 1]


async def test_prompts_of_token_ids(door):
    response = await door.scoring.Score(score([EOS], [0], [1]))
    assert [one.logprob for one in response.scores] == [-0.25, -1.5]


async def test_many_continuations_take_few_places():
    config = make_config(scheduler=small_queue(MAX_AT_ONCE))
    async with front_door(config=config) as door:
        submits = door.num_submits
        response = await door.scoring.Score(score("a", *["b", "c"] * 64))
        assert [one.logprob for one in response.scores] == [-0.25, -1.5] * 64
        await eventually(lambda: door.num_submits == submits + 128)
        assert door.server.supervisor.num_open_requests == 0


def pairs_tokenizer() -> Tokenizer:
    """Of letters, where "ab" is one token, 50."""

    def encode(text: str, _max_tokens: int) -> list[int]:
        ids = []
        while text:
            size = 2 if text.startswith("ab") else 1
            ids.append(50 if size == 2 else ord(text[0]) - 97)
            text = text[size:]
        return ids

    return Tokenizer(encode, [b"x"] * 100, adds_leading_space=False)


async def test_what_merges_with_the_prompt_moves_the_beginning_of_all():
    async with front_door(model=make_model(tokenizer=pairs_tokenizer())) as door:
        response = await door.scoring.Score(score("ca", "b", "c"))
        assert [[token.token_id for token in one.tokens] for one in response.scores] == [
            [50],
            [0, 2],
        ]
        response = await door.scoring.Score(score("ca", "c"))
        assert [token.token_id for token in response.scores[0].tokens] == [2]
        failed = await failure(door.scoring.Score(score("a", "b")))
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "nothing predicts them" in failed.message


async def test_labels_get_probabilities(door):
    response = await door.scoring.Classify(classify("ab", "x", "c", "cx"))
    weights = [math.exp(logprob) for logprob in (-1.5, -0.25, -1.75)]
    assert response.label == "c"
    assert [label.label for label in response.labels] == ["x", "c", "cx"]
    assert [label.logprob for label in response.labels] == [-1.5, -0.25, -1.75]
    assert [label.num_tokens for label in response.labels] == [1, 1, 2]
    found = [label.probability for label in response.labels]
    assert found == pytest.approx([weight / sum(weights) for weight in weights])
    normalised = await door.scoring.Classify(classify("ab", "x", "cx", normalizes_length=True))
    ratio = normalised.labels[1].probability / normalised.labels[0].probability
    assert ratio == pytest.approx(math.exp(1.5 - 1.75 / 2))


async def test_calibration_divides_what_labels_get_anyway(door):
    """After "ab" as after "b", "c" is likely: that is no news. After "x" "y" is, and it is."""
    request = classify("ab", "c", "y", content_free=["b"])
    response = await door.scoring.Classify(request)
    assert [label.probability for label in response.labels] == pytest.approx([0.5, 0.5])
    response = await door.scoring.Classify(classify("ab", "c", "y", content_free=["x", "x"]))
    assert response.labels[0].probability == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert response.usage.prompt_tokens == 4
    assert response.usage.completion_tokens == 6


async def test_embeddings(door):
    response = await door.scoring.Embed(embed("abc"))
    assert list(response.embedding) == pytest.approx([0.6, 0.8])
    assert (response.model, response.usage.prompt_tokens) == ("demo", 3)


REFUSALS = [
    (score("a"), "continuations", "0 continuations"),
    (score("a", *["b"] * 129), "continuations", "129 continuations"),
    (score("a", "b", ""), "continuations[1]", "empty"),
    (score("a", [100]), "continuations[0].token_ids.ids", "outside the vocabulary of 100"),
    (score(None, "b"), "prompt", "no prompt"),
    (score([1], "b"), "continuations[0]", "the prompt is token ids"),
    (score("a", "b" * 64), "continuations[0]", "65 tokens; at most 64"),
    (classify("a", "b"), "labels", "1 labels"),
    (classify("a", "b", ""), "labels[1]", "empty"),
    (classify("a", "b", "c", "b"), "labels[2]", "Labels 0 and 2 are both 'b'"),
    (classify([1], "b", "c"), "labels[0]", "the prompt is token ids"),
    (classify("a", "b", "c", content_free=["a"] * 9), "content_free_prompts", "at most 8"),
    (classify("a", "b", "c", content_free=["x", ""]), "content_free_prompts[1].text", "empty"),
    (score("a", "b", priority=11), "priority", "expected -10 to 10"),
    (embed(""), "text", "empty"),
    (embed([1] * 64), "prompt", "64 tokens; at most 63"),
]


@pytest.mark.parametrize(("request_", "field", "message"), REFUSALS)
async def test_refusals_name_their_field(door, request_, field, message):
    methods = {
        pb.ScoreRequest: door.scoring.Score,
        pb.ClassifyRequest: door.scoring.Classify,
        pb.EmbedRequest: door.scoring.Embed,
    }
    failed = await failure(methods[type(request_)](request_))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert message in failed.message
    assert failed.details[0].field_violations[0].field == field
    assert door.server.supervisor.num_open_requests == 0


async def test_the_longest_continuation_fits(door):
    response = await door.scoring.Score(score("a", "b" * 63))
    assert response.scores[0].num_tokens == 63


async def test_another_model_is_not_found(door):
    failed = await failure(door.scoring.Score(score("a", "b", model="x")))
    assert failed.code == grpc.StatusCode.NOT_FOUND


async def test_an_engine_refusal_keeps_its_reason_and_leaves_nothing(door):
    continuations = [[1], [REFUSED_TOKEN, 2], [3]]
    failed = await failure(door.scoring.Score(score("a", *continuations)))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(failed.details[0], RetryInfo)
    assert door.server.supervisor.num_open_requests == 0


async def test_a_deadline_says_how_far_it_came():
    async with front_door("--step-s", "0.2") as door:
        cancels = door.num_cancels
        failed = await failure(door.scoring.Score(score("a", *["b"] * 100), timeout=0.7))
        assert failed.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "of its prompts were computed" in failed.message
        await eventually(lambda: door.num_cancels > cancels)
        assert door.server.supervisor.num_open_requests == 0


async def test_before_ready_it_is_unavailable(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
        for call in (
            door.scoring.Score(score("a", "b")),
            door.scoring.Classify(classify("a", "b", "c")),
            door.scoring.Embed(embed("a")),
        ):
            failed = await failure(call)
            assert failed.code == grpc.StatusCode.UNAVAILABLE
            assert failed.details[0].retry_delay.seconds > 0
        with open(gate, "wb") as opened:  # noqa: ASYNC230, PTH123
            opened.write(b"go")
        await door.reach(ServerState.READY)
