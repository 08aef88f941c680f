"""A whole model whose experts are computed by the GPU's programs, wherever they were before.

In the interpreter the slots of the "GPU" are RAM that reads do not reach: they pass through staging
memory, host records are copied, and every launch sees slots only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.engine import Engine
from moe_server.errors import MoeServerError
from moe_server.kernels.formats import WeightFormat
from moe_server.messages import TokenEvent
from moe_server.pack import pack
from moe_server.packed import StoreFormat
from moe_server.warmup.preload import preload
from moe_server.weights import Weights
from tests.driver import greedy, run, running_engine, token_ids
from tests.kernels.gpu.numerics.device import IS_INTERPRETED
from tests.tiny import Tiny

TINY = Tiny(dtype="bfloat16", hidden=32, head_dim=8, intermediate=24, experts=4)
PROMPTS = [[5, 9, 200, 31, 7], [17]]
NEW_TOKENS = 3
FORMATS = (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)
RESIDENT = {"device_memory": "64MiB", "host_memory": "1MiB"}


@pytest.fixture(params=FORMATS, ids=lambda one: one.value)
def stored(request, tmp_path) -> Path:
    """A checkpoint whose experts are in a format."""
    source = TINY.write(tmp_path / "source")
    if not request.param.is_integer:
        return source
    pack(
        source,
        tmp_path / "store",
        StoreFormat(WeightFormat.BFLOAT16, request.param, 32),
        assess=lambda *_: {},
    )
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def pretend_gpu(monkeypatch) -> None:
    """Where there is none."""
    if not IS_INTERPRETED:
        return

    def slots(count, stride_bytes, _device):
        return torch.full((count, stride_bytes), 255, dtype=torch.uint8)

    monkeypatch.setattr("moe_server.offload.tiers._gpu_slots", slots)
    monkeypatch.setattr("moe_server.offload.arena._register", lambda *_: None)


@contextmanager
def gpu_engine(path: Path, **flags: Any) -> Iterator[Engine]:
    flags = {"model": str(path), "dense_backend": "resident", "threads": 1, **flags}
    config = load_config(flags=flags | {"device": "cuda"}, environ={})
    plan = plan_memory(config, read_checkpoint(path))
    weights = Weights(config, read_checkpoint(path), plan)
    weights.begin()
    computing = load_config(flags=flags, environ={}) if IS_INTERPRETED else config
    engine = Engine(computing, plan, weights)
    preload(engine, config, plan, lambda progress: None)
    try:
        yield engine
    finally:
        engine.close()


def logprobs(events: list[TokenEvent]) -> torch.Tensor:
    return torch.tensor([event.logprob for event in events])


def budgets_of(path: Path) -> dict[str, dict[str, int]]:
    """Too little for all experts: one slot, one slot and a host tier, some slots of each layer."""
    config = load_config(
        flags={"model": str(path), "device": "cuda", "device_memory": "min", "host_memory": 2**20},
        environ={},
    )
    plan = plan_memory(config, read_checkpoint(path))
    slot, staging = plan.slot_bytes, plan.num_staging * plan.slot_bytes
    least = plan.minimum_device_bytes
    return {
        "one slot": {"device_memory": least, "host_memory": staging},
        "one slot, host tier": {"device_memory": least, "host_memory": staging + 4 * slot},
        "some slots": {"device_memory": least + 6 * slot, "host_memory": staging},
    }


def assert_near(told: list[list[TokenEvent]], expected: list[list[TokenEvent]]) -> None:
    """As near as rounding activations to int8 lets them be."""
    for events, other in zip(told, expected, strict=True):
        assert (logprobs(events)[0] - logprobs(other)[0]).abs() < 0.1


def test_tokens_do_not_depend_on_where_experts_were(stored):
    requests = greedy(PROMPTS, NEW_TOKENS)
    with running_engine(stored) as engine:
        of_cpu = run(engine, requests)
    with gpu_engine(stored, **RESIDENT) as engine:
        touched = engine.cache.counters.disk_reads
        expected = run(engine, requests)
        assert engine.cache.counters.disk_reads == touched
        assert_near(expected, of_cpu)
    for place, budgets in budgets_of(stored).items():
        with gpu_engine(stored, **budgets) as engine:
            for together in (requests, requests[:1]):
                for events, whole in zip(run(engine, together), expected, strict=False):
                    assert token_ids(events) == token_ids(whole), place
                    assert torch.equal(logprobs(events), logprobs(whole)), place
            counters = engine.cache.counters
            assert (counters.host_hits > 0) == (place == "one slot, host tier")
            # One slot may hold, for once, what the start has left in it.
            assert (counters.device_hits > 1) == (place == "some slots")
            assert engine.cache.tiers.cost.computed_in_place == 0
            if place == "one slot, host tier":
                with gpu_engine(stored, **budgets, host_compute=True) as other:
                    assert_near(run(other, requests), expected)
                    assert other.cache.tiers.cost.computed_in_place > 0


def test_only_the_request_that_needs_an_unreadable_expert_fails(tmp_path, monkeypatch):
    path = TINY.write(tmp_path)
    with gpu_engine(path, **budgets_of(path)["one slot"]) as engine:
        acquire, broken = engine.cache.acquire, []

        def failing(layer, experts, *args):
            for held in acquire(layer, experts, *args):
                if len(experts) > 1 and layer == 1 and not broken:
                    broken.append(held.expert)
                    list(held.arrivals)
                    held.arrivals, held.dropped = iter(()), True
                    held.slot, held.error = None, MoeServerError("It is gone.", "Try again.")
                yield held

        engine.cache.acquire = failing
        for request in greedy(PROMPTS, NEW_TOKENS):
            engine.submit(request)
        failed, finished = set(), set()
        while not engine.idle:
            done = engine.step()
            failed |= {one.request_id for one in done.failed}
            finished |= {one.request_id for one in done.tokens if one.finish is not None}
            engine.cache.check_integrity()
    assert failed
    assert failed | finished == {0, 1}
    assert not failed & finished
