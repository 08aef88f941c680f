"""The engine's half of a start: dense weights, then every expert once, reported byte by byte.

Runs in the engine process before its first step, on the engine's own objects; reading was begun
before, while libraries were imported. What it proves is that every byte can be read, those of an
embedding that stays on disk included, and every expert computed; how fast requests then are is for
the probes.
"""

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Protocol

from moe_server.budget import MemoryPlan
from moe_server.config import ModelConfig
from moe_server.engine import Engine
from moe_server.messages import Progress
from moe_server.offload.calibration import Calibration
from moe_server.offload.layout import ExpertId
from moe_server.warmup.stages import DENSE, EVERY_EXPERT, IN_MEMORY

NUM_TOUCHES = 4


class Report(Protocol):
    """Where progress goes."""

    def __call__(self, progress: Progress) -> None: ...


def preload(engine: Engine, config: ModelConfig, plan: MemoryPlan, report: Report) -> None:
    """Loads the dense weights and touches every expert.

    Experts that stay in memory are read first, those that were wanted most before all; those that
    have no place pass through one slot afterwards. Where every one has a slot, each is touched as
    it arrives, while others still do. After a restart those without a place are left out: an
    earlier process has proven them.

    Raises:
        MoeServerError: A read failed.
    """
    checkpoint = engine.model.checkpoint
    experts_total = plan.num_experts_total * plan.expert_bytes

    def progress(stage: str, total: int) -> Callable[[int], None]:
        def said(done: int) -> None:
            report(Progress(stage, done, total))

        said(0)
        return said

    dense_read = progress(DENSE, checkpoint.dense_bytes)
    engine.model.load_dense(dense_read)
    engine.weights.read_embedding(lambda done: dense_read(plan.dense_bytes + done))
    if config.dense_backend == "zero3":
        engine.model.use_zero3(config.zero3_config)
    touched_early: set[ExpertId] = set()

    def arrived(expert: ExpertId) -> None:
        if plan.num_slots >= plan.num_experts_total:  # else the order matters to who stays
            engine.model.experts.touch(expert.layer, expert.expert)
            touched_early.add(expert)

    engine.cache.wait_filled(progress(IN_MEMORY, engine.cache.coming_bytes), arrived)
    _touch_others(engine, plan, touched_early, progress(EVERY_EXPERT, experts_total))
    # On a GPU, kept experts have gone from records to slots: others find their places free.
    engine.weights.fill()
    engine.cache.wait_filled(lambda _done: None)
    engine.weights.note_proven()


def _touch_others(
    engine: Engine, plan: MemoryPlan, early: AbstractSet[ExpertId], touched: Callable[[int], None]
) -> None:
    """Touches what was not touched early; finds out how to read while it reads."""
    was_proven = engine.weights.reuse_read_settings()
    calibration = None if was_proven else Calibration(engine.weights.reader)
    passing, staying = engine.weights.passing(), engine.weights.staying()
    # Layer by layer, as policies expect it. Of a layer the hottest last: it was used last then.
    rank = {expert: number for number, expert in enumerate(staying)}
    order = [*sorted(passing), *sorted(staying, key=lambda one: (one.layer, -rank[one]))]
    for number, expert in enumerate(order, 1):
        was_near = engine.cache.is_near(expert)
        if was_proven and not was_near:
            continue
        if calibration is not None:
            calibration.next()
        if expert not in early:
            engine.model.experts.touch(expert.layer, expert.expert)
        if not was_near and expert not in rank:
            engine.cache.forget(expert)
        touched(number * plan.expert_bytes)
    if calibration is not None:
        calibration.conclude()


def resident_expert_s(engine: Engine) -> float:
    """Seconds that an expert on the device takes with one row: the best of a few, and of a layer.

    The first of them may have to come there; 0 where the model has no experts.
    """
    checkpoint = engine.model.checkpoint
    near = (
        number
        for number in range(checkpoint.num_experts)
        if engine.cache.is_near(ExpertId(0, number))
    )
    expert = next(near, None)
    if expert is None:
        return 0.0

    def touch_s() -> float:
        began = time.perf_counter()
        engine.model.experts.touch(0, expert)
        return time.perf_counter() - began

    return min(touch_s() for _ in range(NUM_TOUCHES))
