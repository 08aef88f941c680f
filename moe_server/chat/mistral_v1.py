"""Conversations of Mixtral 8x7B Instruct and its kin, encoded by mistral-common.

Their tokenizer has no special tokens for turns: "[INST]" is text, and each turn is encoded by
itself, which a template, one string, cannot say. mistral-common is the makers' own code for it. It
takes half a second to import and more on a busy machine, so `prepare` does that on a thread while
the engine loads.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_server.chat.message import Message
from moe_server.errors import MoeServerError

SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
"""Of the `tokenizer.model` that Mistral 7B and Mixtral 8x7B of version 0.1 come with."""


class MistralV1Chat:
    """Encodes conversations with the `tokenizer.model` at `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tokenizer: Any = None
        self._loading = threading.Lock()

    @property
    def is_prepared(self) -> bool:
        return self._tokenizer is not None

    def prepare(self) -> None:
        """Imports the library and reads the file, once; blocks."""
        with self._loading:
            if self._tokenizer is None:
                from mistral_common.tokens.tokenizers.mistral import (  # noqa: PLC0415
                    MistralTokenizer,
                )

                self._tokenizer = MistralTokenizer.from_file(self._file)

    def encode(self, messages: Sequence[Message], _max_tokens: int, answer: str = "") -> list[int]:
        """The prompt of the assistant's next turn, and what that turn begins with.

        Blocks until prepared.

        System messages go before the first user message, neighbours of one role are one message.

        Raises:
            MoeServerError: INVALID where mistral-common refuses the messages.
        """
        self.prepare()
        from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415
        from mistral_common.protocol.instruct.messages import (  # noqa: PLC0415
            AssistantMessage,
            SystemMessage,
            UserMessage,
        )
        from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: PLC0415

        kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
        conversation = [kinds[message.role](content=message.content) for message in messages]
        try:
            encoded = self._tokenizer.encode_chat_completion(
                ChatCompletionRequest(messages=conversation)
            )
        except MistralCommonException as error:
            raise MoeServerError(
                f"This checkpoint's chat format refuses the messages: {error}.", field="messages"
            ) from None
        token_ids: list[int] = encoded.tokens
        if not answer:
            return token_ids
        text_tokenizer = self._tokenizer.instruct_tokenizer.tokenizer
        return [*token_ids, *text_tokenizer.encode(answer, bos=False, eos=False)]
