"""What may follow in one completion.

The engine keeps one beside each constrained request: `sampler` reads what is allowed, and after
each token the engine's postprocessing moves it on. Knows tokens, no logits.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_server.constraints.bounds import MEMORY_BYTES, limits
from moe_server.constraints.grammar import refusal, to_grammar
from moe_server.errors import MoeServerError
from moe_server.messages import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


PROBLEMS = {
    "NoExtensionBias": "no text of this model's tokens satisfies it",
    "ParserTooComplex": "it allows too many ways to go on",
    "LexerTooComplex": "it allows too many ways to go on",
}
"""llguidance's reasons to stop, in words."""
TOO_MANY_STATES = "too many states"
"""What its message says where the lexer's bound on states is reached."""
EMPTY_ONLY = "it allows no text but the empty one"
END_IGNORED = "it asks for an end-of-sequence token, which this request ignores"
MAX_FORKS = 256
"""Requests that share a compiled constraint; the next ones share another."""
POSITION = re.compile(r"^at \d+\(\d+\): ")
"""With which llguidance's messages about grammars begin."""
MAX_PROBLEM_CHARS = 300
"""llguidance's messages quote what they are about."""


class CrowdedError(MoeServerError):
    """Requests that share a compiled constraint need too many states together; one alone may not.

    `Compiler.begin_alone` gives the request a matcher that it shares with nobody.
    """


class Compiled:
    """A constraint as the requests that have it share it. Made by `compile_constraint`.

    They share llguidance's lexer, whose states are computed when they are first needed: what one
    request has paid for is there for the next. They share its bound on states too: whoever comes
    upon it because of others goes on alone.
    """

    __slots__ = (
        "_first_allowed",
        "_matcher",
        "_num_forks",
        "_vocab_size",
        "constraint",
        "is_spent",
        "num_bytes",
    )

    def __init__(self, constraint: Constraint, matcher: "LLMatcher", vocab_size: int) -> None:
        self.constraint = constraint
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_forks = 0
        self.is_spent = False
        """It had enough requests, or one of them reached a bound: the next needs a new one."""
        self.num_bytes = MEMORY_BYTES
        """What it takes; the bound until `Compiler` has measured it."""
        first = Matcher(self, matcher.deep_copy(), vocab_size)
        first.look()
        if first.is_complete:
            raise refusal(constraint, EMPTY_ONLY)
        self._first_allowed = first.allowed

    @property
    def is_shared(self) -> bool:
        """Other requests had it too, and states of theirs are in it."""
        return self._num_forks > 1

    def fork(self, never: list[int]) -> "Matcher":
        """A matcher for one request.

        Args:
            never: Token ids this request never gets: of end of sequence, where it ignores that.

        Raises:
            MoeServerError: Nothing else could begin the text.
        """
        self._num_forks += 1
        self.is_spent |= self._num_forks >= MAX_FORKS
        matcher = Matcher(self, self._matcher.deep_copy(), self._vocab_size, never)
        matcher.allow(self._first_allowed.copy())
        if matcher.is_complete:
            raise refusal(self.constraint, EMPTY_ONLY)
        return matcher


class Matcher:
    """What one request's constraint allows after the tokens so far. Made by `Compiled.fork`."""

    __slots__ = ("_compiled", "_matcher", "_never", "_vocab_size", "allowed", "is_complete")

    allowed: npt.NDArray[np.bool_]
    """(vocab_size,): which tokens may come next; at least one until it is complete."""
    is_complete: bool
    """The text is whole and nothing may follow it."""

    def __init__(
        self, compiled: Compiled, matcher: "LLMatcher", vocab_size: int, never: Sequence[int] = ()
    ) -> None:
        self._compiled = compiled
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._never = list(never)
        self.is_complete = False

    @property
    def may_end(self) -> bool:
        """The text is whole as it is.

        Elsewhere an end-of-sequence token is not the end: a grammar can ask for one by id.
        """
        return bool(self._matcher.is_accepting())

    def accept(self, token_id: int, *, look: bool) -> None:
        """Moves on by a token that was allowed.

        Args:
            token_id: The token.
            look: Whether another may follow. If not, only `is_complete` is kept up to date.

        Raises:
            CrowdedError: It would alone perhaps not.
            MoeServerError: Saying what may follow would take too much.
        """
        self._matcher.consume_token(token_id)
        if look or self._matcher.is_stopped():
            self.look()

    def look(self) -> None:
        """Finds what may follow.

        Raises:
            MoeServerError: As `accept`; or nothing can begin the text.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self.is_complete = True
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self._compiled.is_spent = True
            error = refusal(self._compiled.constraint, problem_of(self._matcher))
            if self._compiled.is_shared and TOO_MANY_STATES in error.message:
                raise CrowdedError(error.message, field=error.field)
            raise error
        self.allow(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))

    def allow(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Allows these tokens, but for those that this request never gets.

        Raises:
            MoeServerError: The text needs one of those.
        """
        allowed[self._never] = False
        self.allowed = allowed
        # llguidance allows at least one token: where none is left it was the end of the sequence.
        self.is_complete = not allowed.any()
        if self.is_complete and not self.may_end:
            raise refusal(self._compiled.constraint, END_IGNORED)


def compile_constraint(
    constraint: Constraint, tokenizer: "LLTokenizer", vocab_size: int
) -> Compiled:
    """Compiles a constraint and says what a text may begin with.

    Can take seconds; works off the GIL.

    Raises:
        MoeServerError: INVALID: it does not parse, or would take too much.
    """
    from llguidance import LLMatcher  # noqa: PLC0415 - only where constraints are used

    matcher = LLMatcher(tokenizer, to_grammar(constraint), log_level=0, limits=limits())
    if matcher.is_error():
        problem = problem_of(matcher)
        if constraint.kind is not ConstraintKind.GRAMMAR:
            # Where in what `to_grammar` wrote around it.
            problem = POSITION.sub("", problem)
        raise refusal(constraint, problem)
    return Compiled(constraint, matcher, vocab_size)


def problem_of(matcher: "LLMatcher") -> str:
    """What of llguidance's message is meant for its user: other lines show states and traces."""
    first, *others = matcher.get_error().strip().splitlines()
    if first in PROBLEMS:
        return PROBLEMS[first]
    if first.startswith("panic"):
        return "llguidance fails on it (special tokens have no names here, only ids such as <[2]>)"
    explanation = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    return " ".join([first[:MAX_PROBLEM_CHARS], *explanation])
