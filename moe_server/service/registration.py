"""Puts servicers on a gRPC server: the one place where requests are deserialised and errors caught.

Built from the descriptors instead of the generated `add_..._to_server`, whose deserialiser turns a
request that does not parse into INTERNAL. Handlers are coroutines `(request, context)`: unary ones
return the response, streaming ones write. They raise MoeServerError and need no try/except.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from moe_server.errors import MoeServerError
from moe_server.service import errors

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour: TypeAlias = Callable[[Any, Context], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its coroutine, what it is given, and whether it writes or returns."""

    behaviour: Behaviour
    request: type[Message]
    streams: bool = False


def methods_of(servicer: object, service: ServiceDescriptor) -> dict[str, Method]:
    """The methods that `service` declares, each bound to the servicer's method of the same name."""
    return {
        method.name: Method(
            getattr(servicer, method.name),
            message_factory.GetMessageClass(method.input_type),
            method.server_streaming,
        )
        for method in service.methods
    }


def add_service(server: grpc.aio.Server, name: str, methods: Mapping[str, Method]) -> None:
    """Serves `methods` under the service's full name."""
    handlers = {method_name: _handler(method) for method_name, method in methods.items()}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])


def _handler(method: Method) -> "grpc.RpcMethodHandler[Any, Any]":
    async def run(frame: bytes, context: Context) -> Any:
        try:
            return await method.behaviour(_parse(method.request, frame), context)
        except grpc.aio.BaseError:
            raise  # gRPC's own: an abort, or a write to a client that has just gone.
        except Exception as error:  # noqa: BLE001  # this is the place where all end up
            await errors.abort(context, error)

    make = (
        grpc.unary_stream_rpc_method_handler
        if method.streams
        else grpc.unary_unary_rpc_method_handler
    )
    # No request deserialiser: `run` gets the bytes, so that a request that does not parse is an
    # error like any other.
    return make(run, None, _serialize)


def _parse(request: type[Message], frame: bytes) -> Message:
    try:
        return request.FromString(frame)
    except (DecodeError, UnicodeDecodeError) as error:
        raise MoeServerError(
            f"The request is not a {request.DESCRIPTOR.full_name}: {errors.shorten(str(error))}.",
            "Strings must be UTF-8; check that client and server use the same .proto.",
        ) from None


def _serialize(response: Message) -> bytes:
    return response.SerializeToString()
