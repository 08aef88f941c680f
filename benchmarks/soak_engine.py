"""The soak's engine half: the step loop alone, whose books can be looked into.

The same engine as behind the server, in this process: requests come faster than it can serve them,
some are cancelled between steps or while a step waits for the disk, some have deadlines, some
constraints. After steps the books are checked, and every event is held to what was asked for. Knows
no sockets; the server's half is `soak`.
"""

import random
import time
from dataclasses import dataclass, field

from benchmarks.engine_inside import loaded_engine
from benchmarks.engine_server import half_resident
from benchmarks.soak import MAX_RUNNING, MAX_WAITING, MODEL, SCHEDULER, SETTINGS
from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import Config, load_config
from moe_server.constraints.compiler import Compiler
from moe_server.messages import (
    Constraint,
    ConstraintKind,
    Sampling,
    StepDone,
    Submit,
)
from moe_server.service.served_model import ServedModel
from moe_server.tokenizer import load_tokenizer

MAX_OPEN = MAX_RUNNING + MAX_WAITING
"""As the front door's places are."""
CHECK_EVERY = 16
"""Steps: checking takes as long as a step of so small a model."""
ARRIVALS_PER_STEP = 0.6
CANCELLED, HURRIED, CONSTRAINED = 0.2, 0.2, 0.1
"""Shares of the requests."""
CANCELLED_PER_POLL = 0.001
"""A step that waits for the disk asks every few hundred microseconds."""


@dataclass
class EngineSoak:
    """What came of it."""

    steps: int = 0
    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preemptions: int = 0
    blocks_left: int = 0
    """KV blocks in use when everybody had gone."""
    wrong: list[str] = field(default_factory=list)


def run(seconds: float, seed: int = 0) -> EngineSoak:
    """Steps for `seconds` of arrivals, and on until all have ended.

    Raises:
        AssertionError: `check_integrity` found the books wrong.
    """
    config = load_config(
        flags={
            "model": MODEL,
            **SETTINGS,
            "device_memory": half_resident(MODEL, **SETTINGS),
            **{f"scheduler.{key}": value for key, value in SCHEDULER.items()},
        },
        environ={},
    )
    soaking = _Soaking(config, random.Random(seed))  # noqa: S311
    try:
        return soaking.run(seconds)
    finally:
        soaking.engine.close()


class _Soaking:
    """One soak under way."""

    def __init__(self, config: Config, rng: random.Random) -> None:
        checkpoint = read_checkpoint(config.model_path)
        plan = plan_memory(config, checkpoint)
        self.engine = loaded_engine(config, read_checkpoint(config.model_path), self._while_waiting)
        tokenizer = load_tokenizer(config.model_path)
        vocabulary = ServedModel.of(config, checkpoint, plan, tokenizer).vocabulary
        assert vocabulary is not None
        self._compiler: Compiler = self.engine.compiler
        self._compiler.use(vocabulary)
        self._vocab_size = checkpoint.vocab_size
        self._rng = rng
        self._open: dict[int, tuple[Submit, int]] = {}
        """Requests that have not ended, and how many tokens they got."""
        self._found = EngineSoak()

    def run(self, seconds: float) -> EngineSoak:
        engine, found, rng = self.engine, self._found, self._rng
        ends_at = time.monotonic() + seconds
        while not engine.idle or time.monotonic() < ends_at:
            has_room = len(self._open) < MAX_OPEN and time.monotonic() < ends_at
            if has_room and rng.random() < ARRIVALS_PER_STEP:
                self._submit()
            if self._open and rng.random() < CANCELLED * ARRIVALS_PER_STEP:
                self._cancel()
            began = time.monotonic()
            self._take(engine.step(), began)
            found.steps += 1
            if found.steps % CHECK_EVERY == 0:
                self._check()
        self._check()
        if self._open:
            found.wrong.append(f"{len(self._open)} requests never ended")
        blocks = engine.scheduler.blocks
        found.blocks_left = blocks.num_blocks - blocks.num_free
        found.preemptions = engine.scheduler.counters.preemptions
        return found

    def _check(self) -> None:
        self.engine.scheduler.check_integrity()
        self.engine.cache.check_integrity()

    def _while_waiting(self) -> None:
        if self._open and self._rng.random() < CANCELLED_PER_POLL:
            self._cancel()

    def _submit(self) -> None:
        rng = self._rng
        prompt = rng.choices(range(3, self._vocab_size), k=rng.randint(1, 96))
        if rng.random() < 0.3:
            prompt[:32] = range(3, 35)
        constraint = None
        if rng.random() < CONSTRAINED:
            constraint = Constraint(ConstraintKind.REGEX, (f"[a-z]{{1,{rng.randint(1, 40)}}}",))
        request = Submit(
            self._found.requests,
            prompt,
            rng.randint(1, 96),
            [2] if constraint else [],
            Sampling(temperature=rng.choice([0.0, 1.0]), seed=self._found.requests),
            logprobs=rng.choice([-1, 3]),
            constraint=constraint,
            deadline=time.monotonic() + rng.random() * 3 if rng.random() < HURRIED else None,
            priority=rng.choice([0, 0, 5, -5]),
        )
        self._found.requests += 1
        self._open[request.request_id] = (request, 0)
        self.engine.submit(request)

    def _cancel(self) -> None:
        request_id = self._rng.choice(list(self._open))
        del self._open[request_id]
        self._found.cancelled += 1
        self.engine.cancel(request_id)

    def _take(self, done: StepDone, began: float) -> None:
        wrong = self._found.wrong
        for event in done.tokens:
            if event.request_id not in self._open:
                wrong.append(f"a token for request {event.request_id}, which had ended")
                continue
            request, num_tokens = self._open[event.request_id]
            self._open[event.request_id] = (request, num_tokens + 1)
            if request.deadline is not None and request.deadline < began:
                wrong.append(f"a token for request {event.request_id} after its deadline")
            if num_tokens + 1 > request.max_new_tokens:
                wrong.append(f"more tokens for request {event.request_id} than it asked for")
            if event.finish is not None:
                del self._open[event.request_id]
                self._found.finished += 1
        for failure in done.failed:
            if self._open.pop(failure.request_id, None) is None:
                wrong.append(f"request {failure.request_id} failed, which had ended")
            self._found.failed += 1
