import dataclasses
import math

import pytest

from moe_server.config import Config, WarmupConfig
from moe_server.warmup.limits import Limits, Speeds, Work
from moe_server.warmup.probe import Probe
from tests.front_door import make_model

GB = 10**9


def work(**plan) -> Work:
    """Two layers of eight experts of 100 MB."""
    sizes = {
        "dense_bytes": GB,
        "expert_bytes": GB // 10,
        "num_experts_total": 16,
        "num_slots": 16,
        "num_records": 0,
    }
    memory = dataclasses.replace(make_model().memory, **{**sizes, **plan})
    return Work(num_layers=2, num_experts=8, num_experts_per_token=2, plan=memory)


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        (Limits(), ""),
        (Limits(100.0, 10.0), ""),
        (Limits(99.0), "time to first token 100.0 ms, 1.0 ms over max_ttft_ms = 99"),
        (
            Limits(max_tpot_ms=4.0),
            "time per output token 10.0 ms, 6.0 ms over max_tpot_ms = 4",
        ),
    ],
)
def test_missed_limits(limits, missed):
    assert limits.missed(Probe(8, 4, 0.1, 0.01)) == missed


def test_a_step_computes_what_it_wants_and_reads_what_is_absent():
    speeds = Speeds(expert_s=0.01, disk_bytes_per_s=GB)
    # 1 GB of dense weights takes as long as ten experts; a token wants 2 of each layer's.
    assert work().step_s(1, speeds) == pytest.approx(0.1 + 2 * 2 * 0.01)
    # 16 tokens want all 8, not 32.
    assert work().step_s(16, speeds) == pytest.approx(0.1 + 2 * 8 * 0.01)
    # A quarter of them is on disk, 0.1 s each.
    assert work(num_slots=12).step_s(16, speeds) == pytest.approx(0.1 + 2 * 8 * 0.01 + 4 * 0.1)
    in_host = work(num_slots=8, num_records=4)
    # Another quarter is in host memory: at 5 GB/s, or what was measured.
    assert in_host.step_s(16, speeds) == pytest.approx(0.26 + 4 * 0.1 + 4 * 0.02)
    copies = dataclasses.replace(speeds, copy_bytes_per_s=10 * GB)
    assert in_host.step_s(16, copies) == pytest.approx(0.26 + 4 * 0.1 + 4 * 0.01)


def test_a_dense_model_has_no_limit_unless_the_operator_sets_one():
    """A step of 14 GB takes a CPU longer than the constants, and no expert says how much longer."""
    dense = work(dense_bytes=14 * GB, expert_bytes=0, num_experts_total=0, num_slots=0)
    dense = dataclasses.replace(dense, num_experts=0, num_experts_per_token=0)
    assert Limits.of(WarmupConfig(), dense, Speeds(), 16) == Limits()
    assert Limits.of(WarmupConfig(max_tpot_ms=9), dense, Speeds(), 16) == Limits(max_tpot_ms=9)


def test_defaults_are_four_times_the_roofline_and_a_constant():
    speeds = Speeds(expert_s=0.01, disk_bytes_per_s=GB)
    limits = Limits.of(WarmupConfig(), work(), speeds, 16)
    assert limits.max_ttft_ms == pytest.approx(1000 * (4 * 0.26 + 1))
    assert limits.max_tpot_ms == pytest.approx(1000 * (4 * 0.14 + 0.25))


def test_the_operators_limits_come_first():
    config = Config(warmup={"max_ttft_ms": 5, "max_tpot_ms": "inf"}).warmup
    assert Limits.of(config, work(), Speeds(1.0), 16) == Limits(5, math.inf)


def test_a_slower_life_is_held_to_the_speed_of_a_faster_one():
    fast, slow = Speeds(0.01, GB), Speeds(0.1, GB // 10)
    assert fast.best_of(slow) == slow.best_of(fast) == fast
    assert Speeds().best_of(slow) == slow.best_of(Speeds()) == slow
