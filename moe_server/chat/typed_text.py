"""Keeps what users type apart from the special tokens that a chat template writes.

A template's output is one string, in which "</s>" typed by a user looks like the template's own. So
before rendering, the first character of whatever could be read as a special token is replaced in
the contents by a stand-in, a private character that the conversation does not have; behind the
split at the special tokens that are left, stand-ins become what they stood for. Texts keep their
length, and contents without such places are not touched: templates see what was sent.
"""

import re
from collections.abc import Collection, Sequence

from moe_server.chat.message import Message

PRIVATE_CHARACTERS = range(0xF0000, 0xFFFFE)
"""A private plane of Unicode: more characters than a conversation's specials can ask for."""


class SpecialNames:
    """The strings of a checkpoint's special tokens. Immutable.

    Args:
        names: At least one character each.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = tuple(names)
        # The longest of those that begin at a place, as tokenizers find it.
        longest_first = sorted(names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._whole = re.compile(pattern)
        self._first_characters = re.compile(f"(?=(?:{pattern}))")
        self._heads = {name[:end] for name in names for end in range(1, len(name))}
        self._tails = {name[start:] for name in names for start in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def split(self, text: str) -> list[str]:
        """Texts and special strings in turn: the first, third, ... are texts, perhaps empty."""
        parts: list[str] = []
        end = 0
        for match in self._whole.finditer(text):
            parts += (text[end : match.start()], match[0])
            end = match.end()
        return [*parts, text[end:]]

    def places(self, content: str) -> set[int]:
        """Where characters must be replaced so that none of the names begins in the content.

        Nor across its ends, whatever a template puts beside the content or the stripped content.
        """
        places = {match.start() for match in self._first_characters.finditer(content)}
        stripped = content.strip()
        if not stripped or not self._longest:
            return places
        first = content.index(stripped)
        last = first + len(stripped) - 1
        lengths = range(1, min(self._longest, len(stripped) + 1))
        is_inner = len(stripped) < self._longest and any(stripped in name for name in self._names)
        if is_inner or any(stripped[:length] in self._tails for length in lengths):
            places.add(first)
        if is_inner or any(stripped[-length:] in self._heads for length in lengths):
            places.add(last)
        return places


class TypedText:
    """The contents of one conversation, with stand-ins.

    Args:
        names: Of the special tokens.
        messages: As they were sent.
        template: Its source, whose characters cannot be stand-ins either.
    """

    def __init__(self, names: SpecialNames, messages: Sequence[Message], template: str) -> None:
        taken = set(template).union(*(message.content for message in messages))
        self._free = (char for code in PRIVATE_CHARACTERS if (char := chr(code)) not in taken)
        self._stand_ins: dict[str, str] = {}
        self.messages = [
            Message(message.role, self._replace(message.content, names.places(message.content)))
            for message in messages
        ]
        self._originals = {ord(stand_in): char for char, stand_in in self._stand_ins.items()}

    def restore(self, text: str) -> str:
        """The text with what the stand-ins stand for."""
        return text.translate(self._originals) if self._originals else text

    def _replace(self, content: str, places: set[int]) -> str:
        if not places:
            return content
        characters = list(content)
        for place in places:
            char = characters[place]
            if char not in self._stand_ins:
                self._stand_ins[char] = next(self._free)
            characters[place] = self._stand_ins[char]
        return "".join(characters)
