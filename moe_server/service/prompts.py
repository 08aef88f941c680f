"""A request's prompt: checked, and encoded without holding up the event loop.

Every refusal names its field and says what was got and what is expected.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

from moe_server.chat.message import ROLES, Message
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.service.errors import shorten
from moe_server.service.served_model import ServedModel
from moe_server.service.validation import AnyGenerateRequest
from moe_server.tokenizer import Tokenizer

MAX_INLINE_CHARS = 2000
"""Longer prompts are tokenised on a thread; shorter ones cost less than the hand-over."""

MAX_MESSAGES = 1024
MAX_UTF8_BYTES = 4
"""Of one character."""

AnyPromptRequest: TypeAlias = (
    AnyGenerateRequest
    | generation_pb2.TokenizeRequest
    | generation_pb2.ScoreRequest
    | generation_pb2.ClassifyRequest
    | generation_pb2.EmbedRequest
    | generation_pb2.Prompt
)
Prompt: TypeAlias = str | list[int] | tuple[Message, ...]
"""Text or a conversation, still to be tokenised, or token ids."""


class Prompts:
    """Checks and encodes the prompts of one model.

    Args:
        model: What they are for.
        at_once: Long prompts that are tokenised side by side; further ones wait.
    """

    def __init__(self, model: ServedModel, at_once: int) -> None:
        self._model = model
        # Not a semaphore: the thread of a request that was cancelled works on, and still counts.
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="tokenise")

    def prepare(self) -> None:
        """Begins to load, on a thread, what the first conversation would wait for."""
        if self._model.chat is not None and not self._model.chat.is_prepared:
            self._threads.submit(self._model.chat.prepare)

    async def encode(self, request: AnyPromptRequest) -> list[int]:
        """The ids of the request's prompt.

        Raises:
            MoeServerError: As check_prompt and the tokenizer do.
        """
        prompt = check_prompt(request, self._model)
        if isinstance(prompt, list):
            return prompt
        return await self._run(prompt, "", self._num_chars(prompt))

    async def encode_continued(
        self,
        request: AnyPromptRequest,
        continuations: Sequence[str | list[int]],
        field: str,
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of the request's prompt, and those of the prompt with each continuation.

        Text is tokenised together with the prompt: it may change the prompt's last tokens. `field`
        is that of the continuations.

        Raises:
            MoeServerError: As `encode`; INVALID for text after token ids.
        """
        prompt = check_prompt(request, self._model)
        if isinstance(prompt, list):
            alone, total_chars = prompt, 0
        else:
            num_chars = self._num_chars(prompt)
            alone = await self._run(prompt, "", num_chars)
            total_chars = len(continuations) * num_chars
        wholes = []
        for index, continuation in enumerate(continuations):
            if not isinstance(continuation, str):
                wholes.append(alone + continuation)
                continue
            if isinstance(prompt, list):
                raise MoeServerError(
                    f"{field}[{index}] is text and the prompt is token ids, which cannot be "
                    "tokenised together.",
                    "Send both as token ids, or both as text.",
                    field=f"{field}[{index}]",
                )
            total_chars += len(continuation)
            wholes.append(await self._run(prompt, continuation, total_chars))
        return alone, wholes

    def _num_chars(self, prompt: str | tuple[Message, ...]) -> int:
        if isinstance(prompt, str):
            return len(prompt)
        return sum(len(message.content) for message in prompt)

    async def _run(
        self, prompt: str | tuple[Message, ...], continuation: str, num_chars: int
    ) -> list[int]:
        """Encodes a text or a conversation, on a thread where it is long."""
        # The last token of a continuation is not run through the model; there is none to follow it.
        room = self._model.max_request_tokens - (not continuation)
        is_short = num_chars <= MAX_INLINE_CHARS
        encode: Callable[[], list[int]]
        if isinstance(prompt, str):
            assert self._model.tokenizer is not None, "check_prompt refuses text without one"
            encode = partial(self._model.tokenizer.encode, prompt + continuation, room)
        else:
            assert self._model.chat is not None, "check_prompt refuses messages without one"
            encode = partial(self._model.chat.encode, prompt, room, continuation)
            is_short = is_short and self._model.chat.is_prepared
        if is_short:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


def check_prompt(request: AnyPromptRequest, model: ServedModel) -> Prompt:
    """The prompt as it was given.

    Raises:
        MoeServerError: INVALID; UNSUPPORTED for text without a tokenizer, and for messages without
            a chat template.
    """
    match request.WhichOneof("prompt"):
        case "text":
            if model.tokenizer is None:
                raise MoeServerError(
                    f"Model {model.name!r} has no tokenizer, so it takes no text.",
                    "Send token_ids.",
                    reason=Reason.UNSUPPORTED,
                    field="text",
                )
            if not request.text:
                raise MoeServerError("The prompt text is empty.", field="text")
            _refuse_oversize(request.text, model.tokenizer, model.max_request_tokens - 1)
            return request.text
        case "token_ids":
            assert not isinstance(request, generation_pb2.TokenizeRequest), "it has no such field"
            token_ids = list(request.token_ids.ids)
            if not token_ids:
                raise MoeServerError("The prompt has no token ids.", field="token_ids.ids")
            if (largest := max(token_ids)) >= model.vocab_size:
                raise MoeServerError(
                    f"Token id {largest} is outside the vocabulary of {model.vocab_size}.",
                    field="token_ids.ids",
                )
            return token_ids
        case "messages":
            return _messages(request.messages.messages, model)
        case _:
            raise MoeServerError(
                "There is no prompt.", "Set text, token_ids or messages.", field="prompt"
            )


def _messages(
    messages: Sequence[generation_pb2.ChatMessage], model: ServedModel
) -> tuple[Message, ...]:
    if model.chat is None or model.tokenizer is None:
        lacks = "tokenizer" if model.tokenizer is None else "chat template"
        raise MoeServerError(
            f"Model {model.name!r} has no {lacks}, so it takes no messages.",
            "Send text or token_ids, or serve a checkpoint with chat_template.jinja or a "
            "chat_template in its tokenizer_config.json.",
            reason=Reason.UNSUPPORTED,
            field="messages",
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise MoeServerError(
            f"There are {len(messages)} messages; expected 1 to {MAX_MESSAGES}.",
            field="messages.messages",
        )
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise MoeServerError(
                f"The role of message {index} is {shorten(message.role, 20)!r}; expected one of "
                f"{', '.join(ROLES)}.",
                field=f"messages.messages[{index}].role",
            )
    contents = "".join(message.content for message in messages)
    _refuse_oversize(contents, model.tokenizer, model.max_request_tokens - 1)
    return tuple(Message(message.role, message.content) for message in messages)


def _refuse_oversize(text: str, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Tokenising megabytes takes seconds; their size alone says when that would be in vain.

    A normalizer that drops characters might have made the text fit: megabytes of blanks, which are
    not worth the work.
    """
    max_bytes = max_tokens * tokenizer.longest_token_bytes
    if len(text) <= max_bytes // MAX_UTF8_BYTES or (num_bytes := len(text.encode())) <= max_bytes:
        return
    raise MoeServerError(
        f"The prompt text has {num_bytes} bytes; the at most {max_tokens} tokens that fit this "
        f"server beside a completion stand for no more than {max_bytes} bytes.",
        "Send a shorter text.",
        field="prompt",
    )
