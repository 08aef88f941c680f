"""What may follow in one completion.

The engine keeps one beside each constrained request: `sampler` reads what is allowed, and after
each token the engine's postprocessing moves it on. Knows tokens, no logits.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_server.constraints.grammar import limits, refusal, to_grammar
from moe_server.messages import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


PROBLEMS = {
    "NoExtensionBias": "no text of this model's tokens satisfies it",
    "ParserTooComplex": "it allows too many ways to go on",
    "LexerTooComplex": "it allows too many ways to go on",
}
"""llguidance's reasons to stop, in words."""
MAX_PROBLEM_CHARS = 300
"""llguidance's messages quote what they are about."""


class Matcher:
    """A constraint and the tokens it has seen. Made by `compile_constraint` and `fork`."""

    __slots__ = ("_constraint", "_matcher", "_never", "_vocab_size", "allowed", "is_complete")

    def __init__(
        self,
        constraint: Constraint,
        matcher: "LLMatcher",
        vocab_size: int,
        allowed: npt.NDArray[np.bool_],
    ) -> None:
        self._constraint = constraint
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._never: list[int] = []
        self.allowed = allowed
        """(vocab_size,): which tokens may come next; at least one until it is complete."""
        self.is_complete = False
        """The text is whole and nothing may follow it."""

    def fork(self, never: list[int]) -> "Matcher":
        """One for another request, from the beginning.

        Args:
            never: Token ids this request never gets: of end of sequence, where it ignores that.

        Raises:
            MoeServerError: Nothing else could begin the text.
        """
        copy = Matcher(
            self._constraint, self._matcher.deep_copy(), self._vocab_size, self.allowed.copy()
        )
        copy._never = never
        copy._drop_never()
        if copy.is_complete:
            raise refusal(self._constraint, "it allows no text but the empty one")
        return copy

    def accept(self, token_id: int, *, look: bool) -> None:
        """Moves on by a token that was allowed.

        Args:
            token_id: The token.
            look: Whether another may follow. If not, only `is_complete` is kept up to date.

        Raises:
            MoeServerError: Saying what may follow would take too much, or nothing can.
        """
        self._matcher.consume_token(token_id)
        if look or self._matcher.is_stopped():
            self.look()

    def look(self) -> None:
        """Finds what may follow.

        Raises:
            MoeServerError: As `accept`.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self.is_complete = True
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise refusal(self._constraint, problem_of(self._matcher))
        self.allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        self._drop_never()

    def _drop_never(self) -> None:
        self.allowed[self._never] = False
        # llguidance allows at least one token: where none is left it was the end of the sequence.
        self.is_complete = not self.allowed.any()


def compile_constraint(
    constraint: Constraint, tokenizer: "LLTokenizer", vocab_size: int
) -> Matcher:
    """Compiles a constraint and says what a text may begin with.

    Can take seconds; works off the GIL.

    Raises:
        MoeServerError: INVALID: it does not parse, or would take too much.
    """
    from llguidance import LLMatcher  # noqa: PLC0415 - only where constraints are used

    matcher = LLMatcher(tokenizer, to_grammar(constraint), log_level=0, limits=limits())
    if matcher.is_error():
        raise refusal(constraint, problem_of(matcher))
    compiled = Matcher(constraint, matcher, vocab_size, np.zeros(vocab_size, np.bool_))
    compiled.look()
    if compiled.is_complete:
        raise refusal(constraint, "it allows no text but the empty one")
    return compiled


def problem_of(matcher: "LLMatcher") -> str:
    """What of llguidance's message is meant for its user: other lines show states and traces."""
    first, *others = matcher.get_error().strip().splitlines()
    if first in PROBLEMS:
        return PROBLEMS[first]
    explanation = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    return " ".join([first[:MAX_PROBLEM_CHARS], *explanation])
