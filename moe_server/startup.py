"""What is told of one model's start: there before its checkpoint could be read, and ever after.

The front door makes one for each model that the configuration names; whoever works on the start
writes it (waiting for files, the supervisor, the warm-up), and the admin service, metrics and the
service manager are told from it.
"""

from dataclasses import dataclass, field

from moe_server.state import ServerState, StateFeed
from moe_server.warmup.stages import StageLog


@dataclass(slots=True)
class Startup:
    """One model's."""

    name: str
    """The model's, as clients see it."""
    feed: StateFeed = field(default_factory=StateFeed)
    stages: StageLog = field(default_factory=StageLog)
    reason: str = ""
    """FAILED: what happened and what to do. Otherwise empty."""

    @property
    def state(self) -> ServerState:
        return self.feed.current
