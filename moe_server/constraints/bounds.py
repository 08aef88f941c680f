"""What one constraint may cost: to compile it, and in every step that it takes part in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

COMPILE_S = 2.0
"""Of processor time; other processes that are busy do not count."""
MEMORY_BYTES = 128 * 2**20
"""A constraint and what compiling it needs on the way."""
STACK_BYTES = 2 * 2**20
"""A quarter of what the engine's threads have: what fits here does not overflow there."""


def limits() -> "LLParserLimits":
    """Llguidance's own bounds: of its defaults, one allows 500 MB of lexer states.

    Those of a step stay as they are: measured, it takes 4 ms at most.
    """
    from llguidance import LLParserLimits  # noqa: PLC0415 - only where constraints are used

    return LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
