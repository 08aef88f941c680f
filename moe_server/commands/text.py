"""Texts of the command line."""

from moe_server.errors import MoeServerError


def checked(text: str, name: str) -> str:
    """The text, if it is one; `name` is what the user calls it.

    Raises:
        MoeServerError: The terminal's bytes were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MoeServerError(f"{name} is not valid UTF-8.") from None
    return text
