"""A request inside the engine."""

from dataclasses import dataclass, field

from moe_server.constraints.matcher import Matcher
from moe_server.messages import Submit, Timings
from moe_server.readout import Readout


@dataclass(slots=True)
class Sequence:
    """A request's tokens and how far the engine has come with them."""

    request: Submit
    arrived: float
    """`time.monotonic()` when the engine read it."""
    waiting_since: float
    """When it arrived, or was preempted last."""
    token_ids: list[int]
    """Prompt and completion."""
    num_computed: int = 0
    """Tokens whose keys and values are stored. Written by the scheduler."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in order of position. Written by the scheduler."""
    block_keys: list[bytes] = field(default_factory=list)
    """Of the prompt's blocks that can be shared; see `BlockPool.keys`. Written by the scheduler."""
    cached_tokens: int | None = None
    """Prompt tokens that were there when it started; None before. Written by the scheduler."""
    timings: Timings = field(default_factory=Timings)
    """Written by the engine after each step; the queue's by the scheduler."""
    matcher: Matcher | None = None
    """What the request's constraint allows next. Set by the engine before it is queued."""
    readout: Readout | None = None
    """What it reads instead of generating. Filled by the model."""

    @classmethod
    def of(cls, request: Submit, now: float) -> "Sequence":
        reads = request.targets or request.pools
        readout = Readout(request) if reads else None
        return cls(request, now, now, list(request.token_ids), readout=readout)

    @property
    def is_running(self) -> bool:
        """True from its start until it has ended, in whatever way, or was preempted."""
        return bool(self.block_table)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_reusable(self) -> int:
        """Its first tokens whose keys and values are all that is needed of them."""
        # At least one has to be computed: the next token is sampled from its logits.
        latest = len(self.token_ids) - 1
        return latest if self.readout is None else min(latest, self.readout.num_reusable)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be run through the model: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Tokens it can grow to."""
        return self.num_prompt_tokens + self.request.max_new_tokens
