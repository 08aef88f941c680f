"""What a start consists of: stages one after another, each timed, counted and able to fail.

Written by the supervisor (what its engine reports) and by the warm-up; read by the admin service.
Knows names and clocks only. A stage that comes again, after its engine was lost or a round failed,
is the same stage with one attempt more; what it failed of is told until it is done.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

PREFLIGHT = "preflight"
LIBRARIES = "libraries"
DENSE = "dense weights"
IN_MEMORY = "experts in memory"
EVERY_EXPERT = "every expert"
SHAPES = "request shapes"
RECORDED = "recorded requests"
PROOF = "proof"
HOT_SET = "hot set"

STAGES = (PREFLIGHT, LIBRARIES, DENSE, IN_MEMORY, EVERY_EXPERT, SHAPES, RECORDED, PROOF, HOT_SET)
"""All of a start, in order."""

MAX_WARNINGS = 10

RATE_WINDOW_S = 5.0
"""A rate is over what came in so long: a disk's speed changes within minutes."""


class StageState(Enum):
    """How far a stage is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """It will be tried again, unless the model is FAILED for good."""


@dataclass(slots=True)
class Stage:
    """One of them, in its last attempt."""

    name: str
    began: float
    """Seconds of the log's clock."""
    state: StageState = StageState.RUNNING
    attempts: int = 1
    ended: float | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    warnings: tuple[str, ...] = ()
    """What it found that works less well than it could, each with the remedy."""
    failure: str = ""
    """Why the last attempt that failed did; empty once the stage is done."""
    seen: deque[tuple[float, int]] = field(default_factory=deque)
    """When how many bytes had come, within RATE_WINDOW_S."""

    def bytes_per_s(self) -> float:
        """Of late; 0 where nothing is to come or nothing has."""
        if len(self.seen) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self.seen[0], self.seen[-1]
        return max(0.0, (last - first) / (last_at - first_at)) if last_at > first_at else 0.0

    def eta_s(self) -> float | None:
        """Seconds until all bytes are there at that rate; None: nobody can tell."""
        rate, missing = self.bytes_per_s(), self.bytes_total - self.bytes_done
        return missing / rate if self.state is StageState.RUNNING and rate and missing > 0 else None


class StageLog:
    """The stages of one model's start, in the order in which they first came.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._running: Stage | None = None
        self._began = clock()
        self._first_ready: float | None = None
        self.doing = "starting"
        """For people: the stage's name, or more closely what is done or waited for."""

    @property
    def stages(self) -> list[Stage]:
        return list(self._stages.values())

    @property
    def running(self) -> Stage | None:
        """The stage in progress; None before the first, after the last, and after a failure."""
        return self._running

    @property
    def elapsed_s(self) -> float:
        """Since this log was made; stands still once the model was READY."""
        return (self._clock() if self._first_ready is None else self._first_ready) - self._began

    @property
    def position(self) -> int:
        """Which of STAGES is in progress, from 1; 0: none of them."""
        stage = self._running  # once: metrics are read on another thread
        return STAGES.index(stage.name) + 1 if stage and stage.name in STAGES else 0

    @property
    def bytes_per_s(self) -> float:
        """What the stage in progress reads of late; 0 where nothing comes."""
        stage = self._running
        return stage.bytes_per_s() if stage else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the stage in progress has its bytes; None: nobody can tell."""
        stage = self._running
        return stage.eta_s() if stage else None

    def seconds(self, stage: Stage) -> float:
        """What its last attempt took, or has taken so far."""
        return (self._clock() if stage.ended is None else stage.ended) - stage.began

    def enter(self, name: str, bytes_done: int = 0, bytes_total: int = 0) -> None:
        """A stage has begun, or come further; the one before it is done."""
        self.doing = name
        now = self._clock()
        stage = self._running
        if stage is None or stage.name != name:
            self.finish()
            before = self._stages.get(name)
            stage = self._running = Stage(name, now)
            if before is not None:
                stage.attempts, stage.failure = before.attempts + 1, before.failure
            self._stages[name] = stage
        stage.bytes_done, stage.bytes_total = bytes_done, bytes_total
        stage.seen.append((now, bytes_done))
        while now - stage.seen[0][0] > RATE_WINDOW_S:
            stage.seen.popleft()

    def warn(self, warnings: Iterable[str]) -> None:
        """Notes what the stage in progress has found, each finding once and not without end."""
        if self._running is not None:
            found = dict.fromkeys((*self._running.warnings, *warnings))
            self._running.warnings = tuple(found)[:MAX_WARNINGS]

    def finish(self) -> None:
        """The stage in progress, if there is one, is done."""
        if self._running is not None:
            self._running.state, self._running.failure = StageState.DONE, ""
            self._running.ended = self._clock()
            self._running = None

    def note_ready(self) -> None:
        """The model is READY."""
        self._first_ready = self._clock() if self._first_ready is None else self._first_ready

    def fail(self, why: str) -> None:
        """The stage in progress, if there is one, has failed."""
        if self._running is not None:
            self._running.state, self._running.failure = StageState.FAILED, why
            self._running.ended = self._clock()
            self._running = None
