"""The simulated day: its costs are the plan's figures, and no request is lost in it."""

import statistics
from dataclasses import replace

import pytest

from benchmarks import day_picture, engine_day
from benchmarks.day import ENDS, Simulation, percentile, summary
from benchmarks.day_costs import Hardware
from benchmarks.day_requests import BURST_S, PER_DAY, SWING, TASKS, Request, requests
from benchmarks.engine_day import ARMS, Found
from moe_server.config import SchedulerConfig

INT4 = Hardware("int4", 16_384, 512)
BF16 = Hardware("bf16", 16_384, 512)
RESIDENT = Hardware("int4", 65_536, 2048, device_gib=40)
SETTINGS = SchedulerConfig(max_running=32)


def test_slots_and_steps_are_those_of_the_plan() -> None:
    assert 195 <= INT4.num_slots <= 215
    assert 45 <= BF16.num_slots <= 60
    assert 20 < 1 / INT4.step(1, 0).total_s < 43
    assert 1.4 < 1 / BF16.step(1, 0).total_s < 2.0
    assert INT4.step(2048, 2048).copy_s == pytest.approx(0.19, rel=0.15)
    assert BF16.step(2048, 2048).copy_s == pytest.approx(2.9, rel=0.1)
    assert INT4.step(2048, 2048).compute_s == pytest.approx(0.35)


def test_nothing_is_copied_where_all_experts_have_a_slot() -> None:
    assert RESIDENT.num_slots == 256
    assert RESIDENT.step(1, 0).copy_s == RESIDENT.step(500, 0).copy_s == 0
    assert 100 < 1 / RESIDENT.step(1, 0).total_s < 172


def test_hit_rates_rise_with_slots_and_fall_with_the_batch() -> None:
    small, large = Hardware("int4", 65_536, 512), INT4
    assert small.hit_rate(1) < large.hit_rate(1)
    assert large.hit_rate(1) > large.hit_rate(4) > large.hit_rate(8) == large.hit_rate(64)


def test_a_day_has_as_many_requests_as_it_says() -> None:
    coming = list(requests(PER_DAY, seed=3))
    assert len(coming) == pytest.approx(PER_DAY, rel=0.02)
    times = [one.arrives_s for one in coming]
    assert times == sorted(times)
    assert statistics.mean(one.prompt_tokens for one in coming) == pytest.approx(2000, rel=0.03)
    minutes = [0] * 1440
    for at in times:
        minutes[int(at // BURST_S)] += 1
    # Bursts apart, the busiest hours have (1 + SWING) / (1 - SWING) times the quietest.
    busy, quiet = (statistics.median(minutes[h * 60 : h * 60 + 120]) for h in (13, 1))
    assert busy / quiet == pytest.approx((1 + SWING) / (1 - SWING), rel=0.2)


def test_a_request_alone_takes_what_its_steps_take() -> None:
    task = replace(TASKS[0], max_new_tokens=8, deadline_s=1000)
    day = Simulation(RESIDENT, SETTINGS).run([Request(5.0, 3000, 3, task)])
    [answer] = day.answers
    steps = [RESIDENT.step(2048, 2048), RESIDENT.step(952, 3000)]
    assert answer.ttft_s == pytest.approx(sum(step.total_s for step in steps))
    assert answer.tpot_s == pytest.approx(RESIDENT.step(1, 3001).total_s, rel=1e-3)
    assert (answer.end, answer.new_tokens, day.steps) == ("done", 3, 4)


@pytest.mark.parametrize("per_day", [20_000, 400_000])
def test_every_request_ends_and_none_after_its_deadline(per_day) -> None:
    day = Simulation(INT4, SETTINGS).run(requests(per_day, 1, 0, 900))
    deadlines = {task.name: task.deadline_s for task in TASKS}
    assert day.answers
    for answer in day.answers:
        assert answer.end in ENDS
        if answer.end == "done":
            # It may end in the step during which its time runs out.
            late = answer.last_s - answer.arrived_s - deadlines[answer.task]
            assert late < INT4.step(512, 16_384).total_s
        else:
            assert answer.last_s is None
    figures = summary(day)
    assert sum(figures[end] for end in ENDS) == 1
    assert 0 < figures["utilisation"] <= 1 + 1e-9
    assert 0 <= figures["wasted_tokens"] < 1
    done = {name: figures[f"done, {name}"] for name in deadlines}
    assert min(done.values()) <= figures["done"] <= max(done.values())
    assert (figures["wasted_tokens"] == 0) == (figures["expired"] == 0)
    # Under overload, too, none of the kinds starves.
    assert min(done.values()) > 0.02


def test_percentiles_of_few_values() -> None:
    assert percentile([], 99) == 0
    assert percentile([7.0], 99) == 7
    assert percentile([float(i) for i in range(101)], 99) == 99


def test_what_is_sustained_ends_at_the_first_load_that_is_not_served() -> None:
    busiest = {10: {"done": 1.0}, 20: {"done": 0.995}, 40: {"done": 0.9}, 80: {"done": 1.0}}
    assert Found(ARMS[0], busiest, None).sustained_per_day == 20


def test_a_picture_is_drawn(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(engine_day, "BUSIEST_S", (0.0, 300.0))
    busiest = engine_day._busiest(ARMS[0], [10_000, 20_000])
    found = [Found(arm, busiest, None) for arm in ARMS]
    assert "Picture" in day_picture.draw(found, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
