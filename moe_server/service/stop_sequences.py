"""Finds stop sequences in text that arrives piece by piece.

One Knuth-Morris-Pratt automaton per sequence, so that the cost is constant per character whatever a
client sends, and the result does not depend on where the pieces were cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """The first stop sequence completed in a piece of text."""

    end: int
    """Index in the piece, one past the match's last character."""
    length: int
    """Characters of the match; it may have begun in an earlier piece."""


class StopMatcher:
    """The state of all automata after the text fed so far."""

    def __init__(self, stop_sequences: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stop_sequences]

    @property
    def num_held_chars(self) -> int:
        """Length of the longest end of the text that could still become a match."""
        return max((automaton.matched for automaton in self._automata), default=0)

    def feed(self, piece: str) -> Match | None:
        """Advances over `piece`; stops at the first character that completes a match.

        Of several sequences completed by the same character the longest counts.
        """
        if not self._automata:
            return None
        for index, char in enumerate(piece):
            lengths = [automaton.length for automaton in self._automata if automaton.advance(char)]
            if lengths:
                return Match(index + 1, max(lengths))
        return None


class _Automaton:
    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.length = len(stop)
        self.matched = 0
        # fallback[n]: the longest proper prefix of stop[:n + 1] that is also its suffix.
        self._fallback = [0] * self.length
        for index in range(1, self.length):
            matched = self._fallback[index - 1]
            while matched and stop[matched] != stop[index]:
                matched = self._fallback[matched - 1]
            self._fallback[index] = matched + (stop[matched] == stop[index])

    def advance(self, char: str) -> bool:
        """True when `char` completes the sequence, after which the automaton is not used again."""
        while self.matched and self._stop[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self._stop[self.matched] == char
        return self.matched == self.length
