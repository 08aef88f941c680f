"""Every refusal of a bad request, over the wire: code, details and field."""

import math

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest, PreconditionFailure, ResourceInfo

from moe_server.messages import Sampling
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.validation import build_submit, check_options
from tests.front_door import VOCAB, failure, front_door, make_model
from tests.front_door import request as make

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door() as door:
        yield door


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def textless_door():
    async with front_door(model=make_model(has_tokenizer=False)) as door:
        yield door


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([1], {"temperature": -0.1}, "sampling.temperature"),
        ([1], {"temperature": NAN}, "sampling.temperature"),
        ([1], {"temperature": INF}, "sampling.temperature"),
        ([1], {"top_p": 0.0}, "sampling.top_p"),
        ([1], {"top_p": 1.1}, "sampling.top_p"),
        ([1], {"top_p": NAN}, "sampling.top_p"),
        ([1], {"min_p": -0.1}, "sampling.min_p"),
        ([1], {"min_p": 1.1}, "sampling.min_p"),
        ([1], {"min_p": NAN}, "sampling.min_p"),
        ([1], {"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ([1], {"repetition_penalty": -1.0}, "sampling.repetition_penalty"),
        ([1], {"repetition_penalty": 9.99e-7}, "sampling.repetition_penalty"),
        ([1], {"repetition_penalty": 1.001e6}, "sampling.repetition_penalty"),
        ([1], {"repetition_penalty": INF}, "sampling.repetition_penalty"),
        ([1], {"repetition_penalty": NAN}, "sampling.repetition_penalty"),
        ([1], {"presence_penalty": 2.1}, "sampling.presence_penalty"),
        ([1], {"presence_penalty": NAN}, "sampling.presence_penalty"),
        ([1], {"frequency_penalty": -2.1}, "sampling.frequency_penalty"),
        ([1], {"num_samples": 17, "temperature": 1.0}, "sampling.num_samples"),
        ([1], {"num_samples": 2}, "sampling.num_samples"),
        ([1], {"num_samples": 2, "temperature": 1e-9}, "sampling.num_samples"),
        ([1], {"top_logprobs": 21}, "output.top_logprobs"),
        ([1], {"stop_token_ids": [1, VOCAB]}, "stopping.stop_token_ids[1]"),
        ([1], {"stop_token_ids": [1] * 65}, "stopping.stop_token_ids"),
        ([1], {"choices": []}, "choices.values"),
        ([1], {"choices": ["a"] * 1001}, "choices.values"),
        ([1], {"choices": ["a", ""]}, "choices.values[1]"),
        ([1], {"choices": ["a" * 40_000, "b" * 40_000]}, "choices"),
        ([1], {"regex": ""}, "regex"),
        ([1], {"regex": "a" * 65_537}, "regex"),
        ([1], {"regex": "(a"}, "regex"),
        ([1], {"json_schema": "{"}, "json_schema"),
        ([1], {"grammar": "start: b"}, "grammar"),
        ([1], {"choices": ["A"]}, "choices"),
        ([1], {"stop_sequences": ["a", ""]}, "stopping.stop_sequences[1]"),
        ([1], {"stop_sequences": ["a" * 257]}, "stopping.stop_sequences[0]"),
        ([1], {"stop_sequences": ["a"] * 17}, "stopping.stop_sequences"),
        ([1], {"priority": 11}, "priority"),
        ([1], {"priority": -11}, "priority"),
        (None, {}, "prompt"),
        ([], {}, "token_ids.ids"),
        ("", {}, "text"),
        ([1, VOCAB, 2], {}, "token_ids.ids"),
        ([1] * 64, {}, "prompt"),
        ("a" * 64, {}, "prompt"),
    ],
)
async def test_a_bad_field_is_named(door, prompt, options, field):
    for call, kind in (
        (door.generation.GenerateStream, pb.GenerateStreamRequest),
        (door.generation.Generate, pb.GenerateRequest),
    ):
        failed = await failure(call(make(prompt, kind, **options)))
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        (detail,) = failed.details
        assert isinstance(detail, BadRequest)
        assert [violation.field for violation in detail.field_violations] == [field]
        assert detail.field_violations[0].description


async def test_messages_say_what_was_got_and_the_limit(door):
    failed = await failure(door.generation.GenerateStream(make([1] * 70)))
    assert "70 tokens" in failed.message
    assert "at most 63" in failed.message
    failed = await failure(door.generation.GenerateStream(make([VOCAB + 5])))
    assert "105" in failed.message
    assert "100" in failed.message


async def test_an_unknown_model_is_not_found(door):
    long_name = "no-such-model" * 10_000
    for name in ("gpt", long_name):
        failed = await failure(door.generation.GenerateStream(make([1], model=name)))
        assert failed.code == grpc.StatusCode.NOT_FOUND
        (detail,) = failed.details
        assert isinstance(detail, ResourceInfo)
        assert detail.resource_type == "model"
        assert detail.resource_name[:100] == name[:100]


async def test_without_a_tokenizer_text_is_a_failed_precondition(textless_door):
    failed = await failure(textless_door.generation.GenerateStream(make("hello")))
    assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "token_ids" in failed.message
    assert isinstance(failed.details[0], PreconditionFailure)
    stops = make([1], stop_sequences=["a"])
    failed = await failure(textless_door.generation.GenerateStream(stops))
    assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
    assert failed.details[0].violations[0].subject == "stopping.stop_sequences"
    for constraint in ({"regex": "a"}, {"json_schema": "{}"}, {"choices": ["a"]}):
        failed = await failure(textless_door.generation.GenerateStream(make([1], **constraint)))
        assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
        assert failed.details[0].violations[0].subject == next(iter(constraint))
    response = await textless_door.generation.Generate(
        make([1], pb.GenerateRequest, max_new_tokens=3)
    )
    assert (response.text, list(response.token_ids)) == ("", [2, 3, 4])


@pytest.mark.parametrize("repetition_penalty", [1e-6, 1e6])
async def test_limits_themselves_are_accepted(door, repetition_penalty):
    at_the_limits = make(
        [1] * 63,
        temperature=0.0,
        top_p=1.0,
        min_p=1.0,
        top_k=2**32 - 1,
        seed=2**64 - 1,
        repetition_penalty=repetition_penalty,
        presence_penalty=2.0,
        frequency_penalty=-2.0,
        stop_token_ids=[VOCAB - 1] * 64,
        top_logprobs=20,
        stop_sequences=["x" * 256] * 16,
        max_new_tokens=2**32 - 1,
        priority=-10,
    )
    events = [event async for event in door.generation.GenerateStream(at_the_limits)]
    assert events[0].started.seed == 2**64 - 1
    assert events[-1].finished.usage.completion_tokens == 1


async def test_absent_sampling_is_greedy_and_values_are_resolved():
    model = make_model()
    options = check_options(make([1]), model)
    assert options.sampling == Sampling(seed=options.sampling.seed)
    assert (options.logprobs, options.max_new_tokens) == (-1, model.default_max_new_tokens)
    options = check_options(make([1], temperature=1e-9, top_k=1000, top_logprobs=3), model)
    assert (options.sampling.temperature, options.sampling.top_k) == (0.0, VOCAB)
    assert options.logprobs == 3
    assert check_options(make([1], logprobs=True), model).logprobs == 0
    of_one_call = [build_submit(n, [1], options, model, None, n) for n in (0, 1)]
    assert [submit.is_patient for submit in of_one_call] == [False, True]
    urgent = check_options(make([1], priority=10), model)
    assert build_submit(1, [1], urgent, model, deadline=None).priority == 10


@pytest.mark.parametrize(
    ("options", "fewest"),
    [
        ({}, 1),
        ({"ignore_eos": True}, 8),
        ({"ignore_eos": True, "stop_sequences": ["b"]}, 1),
        ({"ignore_eos": True, "stop_token_ids": [3]}, 1),
        ({"ignore_eos": True, "max_new_tokens": 99}, 63),
    ],
)
async def test_the_fewest_tokens_are_all_of_them_where_nothing_can_end_it_before(options, fewest):
    model = make_model()
    checked = check_options(make([1], **options), model)
    assert build_submit(1, [1], checked, model, deadline=None).fewest_new_tokens == fewest
