"""grpc.health.v1.Health: "" is this process's life, the generation service's name is readiness.

With a model's name after a slash it is that model's readiness; without, all models'.

Ours, because the stock asyncio servicer stops telling every watcher when one of them leaves. Each
watcher has its own queue of changes (`state.StateFeed`).
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from moe_server.errors import MoeServerError, Reason
from moe_server.service import generation
from moe_server.service.errors import NotFoundError
from moe_server.service.registration import Context, Method
from moe_server.service.registry import Registry
from moe_server.state import ServerState, StateFeed

SERVICE_NAME = "grpc.health.v1.Health"
LIVENESS = ""
READINESS = generation.SERVICE.full_name
MAX_WATCHERS = 1000

Status = health_pb2.HealthCheckResponse


class HealthService:
    """The servicer."""

    def __init__(self, registry: Registry) -> None:
        self._server = registry.feed
        self._feeds = {READINESS: registry.feed}
        for startup in registry.startups:
            self._feeds[f"{READINESS}/{startup.name}"] = startup.feed

    def methods(self) -> dict[str, Method]:
        """For `registration.add_service`."""
        return {
            "Check": Method(self.check, health_pb2.HealthCheckRequest),
            "Watch": Method(self.watch, health_pb2.HealthCheckRequest, streams=True),
            "List": Method(self.list, _list_message("HealthListRequest")),
        }

    async def check(self, request: Any, _context: Context) -> Message:
        """NOT_FOUND for a name we do not know."""
        status = self._status(request.service, self._feed(request.service).current)
        if status == Status.SERVICE_UNKNOWN:
            raise NotFoundError("service", request.service, "", field="service")
        return _response(status)

    async def watch(self, request: Any, context: Context) -> None:
        """The status now and after every change; an unknown name is told as SERVICE_UNKNOWN."""
        if sum(feed.num_watchers for feed in self._feeds.values()) >= MAX_WATCHERS:
            raise MoeServerError(
                f"{MAX_WATCHERS} clients watch already.", "Use Check.", reason=Reason.EXHAUSTED
            )
        last = None
        with self._feed(request.service).watch() as watcher:
            while True:
                status = self._status(request.service, await watcher.next())
                if status != last:
                    await context.write(_response(status))
                last = status

    async def list(self, _request: Message, _context: Context) -> Message:
        """All names and their statuses."""
        response: Any = _list_message("HealthListResponse")()
        for name in (LIVENESS, *self._feeds):
            status = self._status(name, self._feed(name).current)
            response.statuses[name].CopyFrom(_response(status))
        message: Message = response
        return message

    def _feed(self, service: str) -> StateFeed:
        """Whose changes can change the service's status; any will do where none can."""
        return self._feeds.get(service, self._server)

    def _status(self, service: str, state: ServerState) -> int:
        if service == LIVENESS:
            return int(Status.SERVING)
        if service in self._feeds:
            return int(Status.SERVING if state is ServerState.READY else Status.NOT_SERVING)
        return int(Status.SERVICE_UNKNOWN)


def _response(status: int) -> Message:
    response: Message = Status(status=status)
    return response


def _list_message(name: str) -> type[Message]:
    """The messages of List, which grpcio-health-checking 1.76 does not have yet."""
    pool = descriptor_pool.Default()
    full_name = f"grpc.health.v1.{name}"
    try:
        descriptor = pool.FindMessageTypeByName(full_name)
    except KeyError:
        pool.Add(_list_file())
        descriptor = pool.FindMessageTypeByName(full_name)
    return message_factory.GetMessageClass(descriptor)


def _list_file() -> descriptor_pb2.FileDescriptorProto:
    """What List is given and answers.

    `message HealthListRequest {}` and
    `message HealthListResponse { map<string, HealthCheckResponse> statuses = 1; }`.
    """
    field = descriptor_pb2.FieldDescriptorProto
    response = descriptor_pb2.DescriptorProto(
        name="HealthListResponse",
        field=[
            field(
                name="statuses",
                number=1,
                label=field.LABEL_REPEATED,
                type=field.TYPE_MESSAGE,
                type_name=".grpc.health.v1.HealthListResponse.StatusesEntry",
            )
        ],
        nested_type=[
            descriptor_pb2.DescriptorProto(
                name="StatusesEntry",
                field=[
                    field(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING),
                    field(
                        name="value",
                        number=2,
                        label=field.LABEL_OPTIONAL,
                        type=field.TYPE_MESSAGE,
                        type_name=".grpc.health.v1.HealthCheckResponse",
                    ),
                ],
                options=descriptor_pb2.MessageOptions(map_entry=True),
            )
        ],
    )
    return descriptor_pb2.FileDescriptorProto(
        name="moe_server/health_list.proto",
        package="grpc.health.v1",
        syntax="proto3",
        dependency=[health_pb2.DESCRIPTOR.name],
        message_type=[descriptor_pb2.DescriptorProto(name="HealthListRequest"), response],
    )
