"""The one exception a user of the server is meant to read.

Raised by every part that can refuse an input or a configuration. It knows neither gRPC nor the
terminal: the service turns it into a status with details, the CLI into an exit code and a remedy.
"""

from enum import Enum


class Reason(Enum):
    """Why something was refused; the service and the CLI each map it in one place."""

    INVALID = "invalid"
    """The caller's input is wrong and will stay wrong."""
    NOT_FOUND = "not_found"
    """A name, a path or a model does not exist."""
    UNSUPPORTED = "unsupported"
    """The request is sound, but this checkpoint or machine cannot serve it."""
    EXHAUSTED = "exhausted"
    """A bound was reached; trying again later can succeed."""
    UNAVAILABLE = "unavailable"
    """Loading, draining, or without an engine for the moment; trying again later can succeed."""
    EXPIRED = "expired"
    """The request's deadline passed before it finished."""


class MoeServerError(Exception):
    """What went wrong and what to do about it.

    Args:
        message: What was got and what was expected, in one sentence.
        remedy: What the reader can do; may be empty when the message says it.
        reason: The class of failure.
        field: The request field or configuration key at fault, if it is one.
        retry_s: Seconds after which trying again makes sense; 0 where nobody knows.
    """

    def __init__(
        self,
        message: str,
        remedy: str = "",
        *,
        reason: Reason = Reason.INVALID,
        field: str = "",
        retry_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.reason = reason
        self.field = field
        self.retry_s = retry_s

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()
