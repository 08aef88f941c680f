"""Conversations by the checkpoint's own template, with the special tokens that it writes."""

from collections.abc import Sequence

from moe_server.chat.message import Message
from moe_server.chat.template import ChatTemplate
from moe_server.chat.typed_text import SpecialNames, TypedText
from moe_server.errors import MoeServerError
from moe_server.tokenizer import Tokenizer


class TemplateChat:
    """Encodes conversations by the checkpoint's own template."""

    is_prepared = True

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special.ids
        self._names = SpecialNames(self._special_ids)
        self._longest_token_chars = max(
            tokenizer.longest_token_bytes, *map(len, self._special_ids), 1
        )

    def prepare(self) -> None:
        """Nothing is left to do."""

    def encode(self, messages: Sequence[Message], max_tokens: int, answer: str = "") -> list[int]:
        """The prompt of the assistant's next turn, and what that turn begins with.

        Special tokens are the template's; what contents and the answer spell is text.

        Raises:
            MoeServerError: As ChatTemplate.render and Tokenizer.encode do, for field `messages`.
        """
        typed = TypedText(self._names, messages, self._template.source)
        rendered = self._template.render(typed.messages, max_tokens * self._longest_token_chars)
        sections: list[str | int] = []
        for index, part in enumerate(self._names.split(rendered)):
            if index % 2:
                sections.append(self._special_ids[part])
            elif part:
                sections.append(typed.restore(part))
        # One text with what goes before: tokenised as the model would have written it.
        before = sections.pop() if sections and isinstance(sections[-1], str) else ""
        sections.append(f"{before}{answer}")
        encode = self._tokenizer.special.encode_sections
        assert encode is not None, "load_chat refuses tokenizers without it"
        try:
            return encode(sections, max_tokens)
        except MoeServerError as error:
            raise MoeServerError(
                error.message, error.remedy, reason=error.reason, field="messages"
            ) from None
