"""Constraints from a client's call to a real engine and back."""

import json
import re

import grpc
import jsonschema
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import Config
from moe_server.patience import Patience
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.served_model import ServedModel
from moe_server.supervisor import ENGINE_COMMAND
from tests.constraints.test_trials import DEEP
from tests.constraints.vocabularies import demo_tokenizer
from tests.front_door import failure, front_door, make_config, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["spam", "ham"]}, "sure": {"type": "boolean"}},
    "required": ["label", "sure"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    config = make_config(threads=1)
    checkpoint = read_checkpoint(Config().model_path)
    plan = plan_memory(config, checkpoint)
    model = ServedModel.of(config, checkpoint, plan, demo_tokenizer())
    async with front_door(
        config=config, model=model, patience=Patience(), command=ENGINE_COMMAND
    ) as door:
        yield door


async def generate(door, **options) -> pb.GenerateResponse:
    return await door.generation.Generate(
        request("It is ", pb.GenerateRequest, max_new_tokens=100, **options)
    )


async def test_every_kind_of_constraint(door):
    answer = await generate(door, json_schema=json.dumps(SCHEMA))
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE
    answer = await generate(door, regex="[a-f]{4,9}", temperature=1.0)
    assert re.fullmatch("[a-f]{4,9}", answer.text)
    assert (await generate(door, choices=["spam", "ham"])).text in ("spam", "ham")
    assert (await generate(door, grammar='start: "<" /[a-z]{2}/ ">"')).text[::3] == "<>"


async def test_samples_of_one_seed_are_the_same_however_many(door):
    options = {"temperature": 1.0, "seed": 11, "regex": "[a-z]{12}"}
    [four, two] = [await generate(door, num_samples=number, **options) for number in (4, 2)]
    one = await generate(door, **options)
    texts = [four.text, *(sample.text for sample in four.further_samples)]
    assert len(set(texts)) == 4
    assert [two.text, *(sample.text for sample in two.further_samples)] == texts[:2]
    assert one.text == texts[0]


async def test_a_bomb_is_refused_by_name_and_harms_nobody(door):
    pid = door.server.supervisor.engine_pid
    failed = await failure(generate(door, grammar=DEEP.texts[0]))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    [detail] = failed.details
    assert isinstance(detail, BadRequest)
    assert detail.field_violations[0].field == "grammar"
    assert (await generate(door, choices=["ham"])).text == "ham"
    assert door.server.supervisor.engine_pid == pid
