"""The cost model's choices from speeds that the test gives it, and in an engine that measures."""

import pytest

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.offload.cost import CostModel, Speed
from tests.driver import greedy, run, running_engine, token_ids
from tests.tiny import Tiny

MB = 10**6


def told(copy, on_host, on_device, rows=1):
    """A model of split memory that has seen one of each, in bytes per second."""
    cost = CostModel(shared_memory=False)
    cost.copy.observe(MB, MB / copy)
    cost.observe_compute(rows, MB, MB / on_host, in_host=True)
    cost.observe_compute(rows, MB, MB / on_device, in_host=False)
    return cost


@pytest.mark.parametrize(
    ("copy", "on_host", "on_device", "pays"),
    [
        (25e9, 10e9, 1500e9, True),  # a slow host
        (25e9, 100e9, 1500e9, False),  # a host as fast as its memory
        (25e9, 24e9, 1500e9, True),
        (25e9, 26e9, 1500e9, False),
        (25e9, 20e9, 30e9, False),  # the device is hardly faster
    ],
)
def test_copying_pays_where_it_is_sooner_done(copy, on_host, on_device, pays):
    assert told(copy, on_host, on_device).copy_pays(1, MB) is pays


def test_rows_are_told_apart():
    cost = told(25e9, 100e9, 1500e9, rows=1)
    cost.observe_compute(200, MB, MB / 1e9, in_host=True)
    cost.observe_compute(200, MB, MB / 1000e9, in_host=False)
    assert not cost.copy_pays(1, MB)
    assert cost.copy_pays(255, MB)


def test_what_is_not_known_is_tried():
    cost = CostModel(shared_memory=False)
    assert not cost.copy_pays(1, MB), "computing in place was never timed"
    cost.observe_compute(1, MB, 1e-3, in_host=True)
    assert cost.copy_pays(1, MB), "copying was never timed"


def test_one_memory_needs_no_copies_and_no_clock():
    cost = CostModel(shared_memory=True)
    assert not cost.copy_pays(1, MB)
    assert not cost.wants_compute(1, in_host=True)


def test_timing_gets_rare_once_a_speed_is_known():
    cost = CostModel(shared_memory=False)
    assert cost.wants_compute(1, in_host=True)
    cost.observe_compute(1, MB, 1e-3, in_host=True)
    asked = [cost.wants_compute(1, in_host=True) for _ in range(320)]
    assert sum(asked) == 10
    assert cost.wants_compute(1, in_host=False)


@pytest.mark.parametrize(("reuse", "pays"), [(0.05, False), (0.5, True)])
def test_demoting_pays_where_it_saves_more_reading_than_it_copies(reuse, pays):
    cost = CostModel(shared_memory=True, disk=Speed(2e9), copy=Speed(10e9), reuse=reuse)
    assert cost.demotion_pays(MB) is pays


def test_a_mean_follows_a_change():
    speed = Speed()
    for _ in range(100):
        speed.observe(MB, 1e-3)
    for _ in range(60):
        speed.observe(MB, 4e-3)
    assert speed.bytes_per_s == pytest.approx(0.25e9, rel=0.02)


class SlowHost(CostModel):
    """Split memory whose host computes a hundred times as slowly as it does."""

    def observe_compute(self, rows, nbytes, seconds, *, in_host):
        super().observe_compute(rows, nbytes, seconds * (100 if in_host else 1), in_host=in_host)


class SlowDevice(CostModel):
    """As slow a device: what is measured here is 1 KB, whose times say nothing."""

    def observe_compute(self, rows, nbytes, seconds, *, in_host):
        super().observe_compute(rows, nbytes, seconds * (1 if in_host else 100), in_host=in_host)


@pytest.mark.parametrize("prices", [SlowDevice, SlowHost])
def test_an_engine_with_split_memory_measures_and_chooses(tmp_path, prices):
    """RAM stands in for a device: what is timed, chosen and counted is the same."""
    path = Tiny(dtype="bfloat16").write(tmp_path)
    requests = greedy([[1, 2, 3], [4, 5], [6]], 24)
    with running_engine(path) as engine:
        expected = [token_ids(events) for events in run(engine, requests)]
    least = load_config(flags={"model": str(path), "device_memory": "min"}, environ={})
    plan = plan_memory(least, read_checkpoint(path))
    budgets = {
        "device_memory": plan.minimum_device_bytes + 3 * plan.slot_bytes,
        "host_memory": 8 * plan.slot_bytes,
    }
    with running_engine(path, **budgets) as engine:
        cost = engine.cache.tiers.cost = prices(shared_memory=False)
        answers = [token_ids(events) for events in run(engine, requests)]
    assert answers == expected
    assert cost.on_host
    assert cost.copy.bytes_per_s
    assert cost.on_device
    if prices is SlowHost:
        assert cost.copied > cost.computed_in_place > 0, "it has to compute there to know"
    else:
        assert cost.computed_in_place > cost.copied
