"""What one constraint may cost: to compile it, and in every step that it takes part in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

COMPILE_S = 2.0
"""Of processor time; other processes that are busy do not count."""
MEMORY_BYTES = 32 * 2**20
"""A constraint and what compiling it needs on the way."""
KEPT_BYTES = 256 * 2**20
"""All compiled constraints that the engine keeps for the next request, but for lexer states."""
STACK_BYTES = 2**20
"""An eighth of what the engine's threads have (half where `ulimit -s` is unlimited): what fits here
does not overflow there."""

TOO_SLOW = f"it takes more than {COMPILE_S:g} s of processor time to compile"
TOO_LARGE = f"it needs more than {MEMORY_BYTES // 2**20} MiB to compile, or nests too deeply"


def limits() -> "LLParserLimits":
    """What llguidance itself keeps to.

    Its defaults let an ambiguous grammar take 120 ms for one token (Mixtral's 32,000, one core) and
    lexer states 500 MB, and run out of fuel in the middle of long words of any script. With these
    one token took 35 ms at most. 20,000 states took 12 MB and were too few for what requests share:
    255 documents of four strings of up to 1,200 characters need 60,000 together.
    """
    from llguidance import LLParserLimits  # noqa: PLC0415 - only where constraints are used

    return LLParserLimits(
        step_max_items=10_000,
        step_lexer_fuel=1_000_000,
        max_lexer_states=60_000,
        verbose_errors=False,
    )
