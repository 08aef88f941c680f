"""A request's prompt to token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from moe_server.chat.message import Message
from moe_server.errors import MoeServerError
from moe_server.service import validation
from moe_server.service.served_model import ServedModel

MAX_INLINE_CHARS = 2000
"""Longer prompts are tokenised on a thread; shorter ones cost less than the hand-over."""


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

    async def encode(self, request: validation.AnyPromptRequest) -> list[int]:
        """The ids of the request's prompt.

        Raises:
            MoeServerError: As validation.check_prompt and the tokenizer do.
        """
        prompt = validation.check_prompt(request, self._model)
        if isinstance(prompt, list):
            return prompt
        return await self._run(prompt, "", self._num_chars(prompt))

    async def encode_continued(
        self,
        request: validation.AnyPromptRequest,
        continuations: Sequence[str | list[int]],
        field: str,
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of the request's prompt, and those of the prompt with each continuation.

        Text is tokenised together with the prompt: it may change the prompt's last tokens. `field`
        is that of the continuations.

        Raises:
            MoeServerError: As `encode`; INVALID for text after token ids.
        """
        prompt = validation.check_prompt(request, self._model)
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
