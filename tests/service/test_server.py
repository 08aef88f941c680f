"""The listener itself: ports, bytes on the wire, reflection, models, unexpected exceptions."""

import re

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import model_pb2
from moe_server.service.registration import Method, add_service
from moe_server.service.server import Server, dialable
from moe_server.startup import Startup
from tests.front_door import failure, front_door, make_config

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door() as door:
        yield door


INVALID_UTF8 = b"\x0a\x02\xc3\x28"
"""Field 1 (`model` in a generation request, `name` in GetModel), two bytes that are not UTF-8."""


@pytest.mark.parametrize(
    "method",
    [
        "/moe_server.v1.GenerationService/Generate",
        "/moe_server.v1.GenerationService/GenerateStream",
        "/moe_server.v1.ModelService/GetModel",
        "/grpc.health.v1.Health/Check",
    ],
)
@pytest.mark.parametrize("frame", [INVALID_UTF8, b"\xff\xff\xff"])
async def test_a_frame_that_does_not_parse_is_an_invalid_argument(door, method, frame):
    failed = await failure(door.channel.unary_stream(method)(frame))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(failed.details[0], BadRequest)
    assert "UTF-8" in failed.message


async def test_a_request_that_is_too_large_is_refused():
    config = make_config(service={"max_message_bytes": 1000})
    async with front_door(config=config) as door:
        call = door.channel.unary_unary("/moe_server.v1.GenerationService/Generate")
        failed = await failure(call(b"\x12\x88\x27" + b"a" * 5000))
        assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_taken_port_is_an_error_with_a_remedy(door):
    with pytest.raises(MoeServerError, match=re.escape(door.server.address)) as caught:
        Server(make_config(listen=door.server.address), [Startup("demo")])
    assert caught.value.field == "listen"
    assert caught.value.remedy
    with pytest.raises(MoeServerError) as caught:
        Server(make_config(admin_listen=door.server.address), [Startup("demo")])
    assert caught.value.field == "admin_listen"


async def test_port_0_is_resolved(door):
    host, _, port = door.server.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


async def test_a_unix_socket_works(tmp_path):
    address = f"unix:{tmp_path / 'socket'}"
    async with front_door(config=make_config(listen=address)) as door:
        assert door.server.address == address
        assert len((await door.models.ListModels(model_pb2.ListModelsRequest())).models) == 1


@pytest.mark.parametrize(
    ("bound", "dialled"),
    [
        ("0.0.0.0:5", "127.0.0.1:5"),
        ("[::]:5", "[::1]:5"),
        ("10.0.0.1:5", "10.0.0.1:5"),
        ("unix:/x", "unix:/x"),
    ],
)
async def test_the_warm_up_dials_an_address_that_exists(bound, dialled):
    assert dialable(bound) == dialled


async def test_reflection_lists_the_services(door):
    stub = reflection_pb2_grpc.ServerReflectionStub(door.channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    response = await anext(aiter(stub.ServerReflectionInfo(requests)))
    names = {service.name for service in response.list_services_response.service}
    assert names == {
        "moe_server.v1.GenerationService",
        "moe_server.v1.ModelService",
        "moe_server.v1.ScoringService",
        "moe_server.v1.TokenizerService",
        "moe_server.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_models(door):
    (listed,) = (await door.models.ListModels(model_pb2.ListModelsRequest())).models
    got = (await door.models.GetModel(model_pb2.GetModelRequest())).model
    assert listed == got
    assert (got.name, got.vocab_size, got.max_context_tokens) == ("demo", 100, 64)
    assert got.has_tokenizer
    assert 0 < got.num_active_parameters < got.num_parameters
    failed = await failure(door.models.GetModel(model_pb2.GetModelRequest(name="gpt")))
    assert failed.code == grpc.StatusCode.NOT_FOUND


async def test_an_unexpected_exception_is_internal_and_leaks_nothing():
    async def broken(_request, _context):
        raise RuntimeError("the secret path /etc/shadow")

    server = grpc.aio.server()
    add_service(server, "test.Broken", {"Break": Method(broken, model_pb2.GetModelRequest)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with capture_logs() as logs:
            failed = await failure(channel.unary_unary("/test.Broken/Break")(b""))
    await server.stop(0)
    assert failed.code == grpc.StatusCode.INTERNAL
    assert "secret" not in failed.message
    reference = re.search(r"Internal error (\w+)", failed.message)[1]
    assert [entry["reference"] for entry in logs] == [reference]
    assert "the secret path" in str(logs[0]["exc_info"])
