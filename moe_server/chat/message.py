"""One message of a conversation."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """Who says what. `role` is one of ROLES, `content` is untrusted."""

    role: str
    content: str
