"""A checkpoint's chat template: Jinja, in the dialect that transformers gives templates.

The template is the operator's, the messages are anybody's: it is rendered in a sandbox, and its
output is bounded in size and time. Knows no tokens; `chat.py` calls it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_server.chat.message import Message
from moe_server.errors import MoeServerError, Reason

MAX_RENDER_S = 5.0
"""Templates of public checkpoints take milliseconds for hundreds of messages."""


class RefusedByTemplateError(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


class _Generation(Extension):
    """`{% generation %}`, a mark for training: its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        origin: Where it comes from, for messages.
        variables: `bos_token` and the like.

    Raises:
        MoeServerError: It does not compile.
    """

    def __init__(self, source: str, origin: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._origin = origin
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise MoeServerError(
                f"The chat template in {origin} does not compile: {error}.",
                "Copy the file again, or take the template out to serve without chat.",
                reason=Reason.UNSUPPORTED,
            ) from None

    def render(self, messages: Sequence[Message], max_chars: int) -> str:
        """The prompt of the assistant's next turn, as text.

        Raises:
            MoeServerError: INVALID where the template refuses the messages or writes more than
                `max_chars`; UNSUPPORTED where it fails or takes too long.
        """
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        pieces: list[str] = []
        num_chars = 0
        until = time.monotonic() + MAX_RENDER_S
        try:
            for piece in self._template.generate(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise MoeServerError(
                        f"The messages become a prompt of more than {max_chars} characters, which "
                        "cannot fit this server.",
                        "Send fewer or shorter messages.",
                        field="messages",
                    )
                if time.monotonic() > until:
                    raise self._failure(f"takes more than {MAX_RENDER_S:g} s for these messages")
        except MoeServerError:
            raise
        except RefusedByTemplateError as error:
            raise MoeServerError(
                f"The checkpoint's chat template refuses the messages: {error}",
                field="messages",
            ) from None
        except Exception as error:  # noqa: BLE001  # a template can raise whatever Python can
            raise self._failure(f"fails for these messages: {error!r}") from None
        return "".join(pieces)

    def _failure(self, what: str) -> MoeServerError:
        return MoeServerError(
            f"The chat template in {self._origin} {what}.",
            "Correct the template, or send text or token_ids.",
            reason=Reason.UNSUPPORTED,
            field="messages",
        )


def _refuse(message: str) -> NoReturn:
    raise RefusedByTemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005  # local time, as transformers has it


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # templates pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
