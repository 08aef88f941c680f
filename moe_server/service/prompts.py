"""A request's prompt to token ids, without holding up the event loop.

One for all services of a server, so that together they tokenise a bounded number of long prompts at
a time.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from moe_server.service import validation
from moe_server.service.served_model import ServedModel

MAX_INLINE_CHARS = 2000
"""Longer prompts are tokenised on a thread; shorter ones cost less than the hand-over."""

MAX_TOKENISING = 2
"""Long prompts tokenised at a time: one of 1 MB takes a core for a second and 100 MB meanwhile."""


class Prompts:
    """Checks and encodes the prompts of one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        # Not a semaphore: the thread of a request that was cancelled works on, and still counts.
        self._threads = ThreadPoolExecutor(MAX_TOKENISING, thread_name_prefix="tokenise")

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
        room = self._model.max_request_tokens - 1
        encode: Callable[[], list[int]]
        if isinstance(prompt, str):
            assert self._model.tokenizer is not None, "check_prompt refuses text without one"
            encode = partial(self._model.tokenizer.encode, prompt, room)
            is_short = len(prompt) <= MAX_INLINE_CHARS
        else:
            assert self._model.chat is not None, "check_prompt refuses messages without one"
            encode = partial(self._model.chat.encode, prompt, room)
            num_chars = sum(len(message.content) for message in prompt)
            is_short = self._model.chat.is_prepared and num_chars <= MAX_INLINE_CHARS
        if is_short:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
