"""From a refusal to a gRPC status with google.rpc details.

The only place that knows status codes. `registration` calls it for every handler, so that handlers
raise MoeServerError and nothing else. A client finds the remedy in the message and in a machine's
terms in the details.
"""

import asyncio
import secrets
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import (
    BadRequest,
    ErrorInfo,
    PreconditionFailure,
    ResourceInfo,
    RetryInfo,
)
from google.rpc.status_pb2 import Status

from moe_server.errors import MoeServerError, Reason

log = structlog.get_logger(__name__)

DOMAIN = "moe_server"
MAX_MESSAGE_CHARS = 1000
"""Messages quote what the caller sent; a status travels in a header, which is bounded."""
RETRY_DELAY_S = {Reason.EXHAUSTED: 1.0, Reason.UNAVAILABLE: 2.0}
"""At least; an error may name a longer one itself."""
STATUS_DETAILS_KEY = "grpc-status-details-bin"

CODES = {
    Reason.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.EXPIRED: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class NotFoundError(MoeServerError):
    """A name that is not known, and what kind of thing it was to name."""

    def __init__(self, kind: str, name: str, remedy: str, *, field: str) -> None:
        super().__init__(
            f"There is no {kind} {shorten(name)!r} here.",
            remedy,
            reason=Reason.NOT_FOUND,
            field=field,
        )
        self.kind = kind
        self.name = name


class PermissionDeniedError(MoeServerError):
    """A caller that may not do this, whatever it sends."""


def shorten(text: str, limit: int = 200) -> str:
    """At most `limit` characters, for quoting in a message."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """Ends the RPC with the status for `error`; never returns.

    An unexpected exception goes to the log with its traceback; the client gets a reference to it.
    """
    if isinstance(error, MoeServerError):
        message, details = str(error), [_detail(error)]
    else:
        reference = secrets.token_hex(4)
        log.error("internal error", reference=reference, exc_info=error)
        details = []
        message = f"Internal error {reference}; the server's log says more."
    message = shorten(message, MAX_MESSAGE_CHARS)
    code = code_of(error)
    status = Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, ((STATUS_DETAILS_KEY, status.SerializeToString()),))


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status that an RPC ends with which `error` ended."""
    match error:
        case PermissionDeniedError():
            return grpc.StatusCode.PERMISSION_DENIED
        case MoeServerError():
            return CODES[error.reason]
        case asyncio.CancelledError() | grpc.aio.BaseError():  # the client has gone
            return grpc.StatusCode.CANCELLED
        case _:
            return grpc.StatusCode.INTERNAL


def _detail(error: MoeServerError) -> Message:
    message = shorten(error.message, MAX_MESSAGE_CHARS)
    detail: Message
    match error.reason:
        case _ if isinstance(error, PermissionDeniedError):
            detail = ErrorInfo(reason="PERMISSION_DENIED", domain=DOMAIN)
        case Reason.INVALID:
            violation = BadRequest.FieldViolation(field=error.field, description=message)
            detail = BadRequest(field_violations=[violation])
        case Reason.NOT_FOUND if isinstance(error, NotFoundError):
            detail = ResourceInfo(
                resource_type=error.kind,
                resource_name=shorten(error.name),
                description=shorten(str(error), MAX_MESSAGE_CHARS),  # it says what there is
            )
        case Reason.UNSUPPORTED:
            unmet = PreconditionFailure.Violation(
                type="UNSUPPORTED", subject=error.field, description=message
            )
            detail = PreconditionFailure(violations=[unmet])
        case Reason.EXHAUSTED | Reason.UNAVAILABLE:
            retry_s = max(RETRY_DELAY_S[error.reason], error.retry_s)
            delay = Duration()
            delay.FromNanoseconds(round(1e9 * retry_s))
            detail = RetryInfo(retry_delay=delay)
        case _:
            detail = ErrorInfo(reason=error.reason.name, domain=DOMAIN)
    return detail
