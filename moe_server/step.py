"""A step as the model is given it: the requests' parts, and whose the rows are.

`engine` makes it, `model` runs it, and whoever reads weights for it asks it what is still wanted
and who must hear that they cannot be read.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from moe_server.errors import MoeServerError
from moe_server.readout import Readout


@dataclass(frozen=True, slots=True)
class StepInput:
    """One request's part of a step, as the scheduler decided it."""

    token_ids: Sequence[int]
    """Its new tokens, at least one."""
    num_context: int
    """Its tokens once these are stored."""
    num_prompt: int
    """Those of its prompt; the others were generated."""
    block_table: Sequence[int]
    """KV blocks in order of position, enough for `num_context`."""
    wants_logits: bool
    """True where the last new token is to be followed by a sampled one."""
    still_wanted: Callable[[], bool]
    """Turns false when the request has left: its results are of no use any more."""
    fail: Callable[[MoeServerError], None]
    """Called when one of its rows needs weights that cannot be read; it must leave then."""
    readout: Readout | None = None
    """What is read from its rows."""


def nothing() -> None:
    """Nobody has to be asked."""


class Step:
    """The requests of a step, their rows one behind the other.

    Args:
        requests: In the order of their rows.
        poll: Called while the disk is waited for; requests may leave in it.
    """

    def __init__(
        self, requests: Sequence[StepInput] = (), poll: Callable[[], None] = nothing
    ) -> None:
        self.poll = poll
        self._requests = requests
        self._ends = list(accumulate(len(request.token_ids) for request in requests))

    def are_all_wanted(self) -> bool:
        """True where no request has left."""
        return all(request.still_wanted() for request in self._requests)

    def requests_of(self, rows: Iterable[int]) -> list[StepInput]:
        """The requests that are still there and that these rows belong to."""
        numbers = sorted({bisect_right(self._ends, row) for row in rows})
        owners = [self._requests[number] for number in numbers]
        return [request for request in owners if request.still_wanted()]
