"""From token events to what a client may see of them.

Detokenises incrementally and holds back text that could become a stop sequence. A token is released
once all its text is, so token ids and text of a stream never run apart by more than what is held:

- Without a tokenizer, and without stop sequences, every token is released as it comes.
- When a stop sequence matches, the text before it is released, with the tokens that contributed to
  that text; the last of them may reach into the match. The tokens of the match itself are not.
- A token without text (a special token, or part of a character) is released when the text before it
  is; it can therefore precede a match that it turns out to belong to.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_server.messages import TokenEvent
from moe_server.service.stop_sequences import StopMatcher
from moe_server.tokenizer import Detokenizer


@dataclass(slots=True)
class Released:
    """What may go to the client."""

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class TextStream:
    """The text of one completion. Offsets count characters of the whole completion."""

    def __init__(self, detokenizer: Detokenizer | None, stop_sequences: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop_sequences)
        self._held_text = ""
        self._end = 0
        self._held_tokens: deque[tuple[int, int, TokenEvent]] = deque()
        """(offset where its text starts, offset where it ends, the token)"""
        self.num_tokens = 0
        """Tokens seen, up to and including the one that completed a match."""
        self.is_stopped = False
        """A stop sequence matched; nothing more may be pushed."""

    def push(self, events: Sequence[TokenEvent], *, is_last: bool) -> Released:
        """Takes new tokens; returns what is released by them.

        Args:
            events: Tokens in order. Those after a match are ignored.
            is_last: The completion ends here, so only a match keeps text back.
        """
        for event in events:
            self.num_tokens += 1
            text = "" if self._detokenizer is None else self._detokenizer.push(event.token_id)
            start = self._end
            released = self._append(text)
            self._held_tokens.append((start, self._end, event))
            if self.is_stopped:
                return self._release_before_match(released)
        if is_last and self._detokenizer is not None:
            match = self._append(self._detokenizer.flush())
            if self.is_stopped:
                return self._release_before_match(match)
        num_held = 0 if is_last else self._matcher.num_held_chars
        return self._release(self._end - num_held)

    def _append(self, text: str) -> int:
        """Appends text, cut after a match; returns the offset where the match starts."""
        match = self._matcher.feed(text)
        if match is not None:
            text = text[: match.end]
            self.is_stopped = True
        self._held_text += text
        self._end += len(text)
        return self._end - match.length if match is not None else self._end

    def _release(self, until: int) -> Released:
        num_chars = until - (self._end - len(self._held_text))
        released = Released(self._held_text[:num_chars])
        self._held_text = self._held_text[num_chars:]
        while self._held_tokens and self._held_tokens[0][1] <= until:
            released.tokens.append(self._held_tokens.popleft()[2])
        return released

    def _release_before_match(self, match_start: int) -> Released:
        released = self._release(match_start)
        released.tokens += [event for start, _, event in self._held_tokens if start < match_start]
        return released
