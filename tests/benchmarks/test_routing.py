"""The routing benchmark: differences, what it calls the overhead, and arms that do equal work."""

import random

import pytest
import torch

from benchmarks import routing, routing_arms, routing_picture
from benchmarks.routing_summary import (
    PARTS,
    Difference,
    Routing,
    as_json,
    difference,
    per_token,
    ratios,
    table,
)
from moe_server.kernels import native
from moe_server.kernels.formats import WeightFormat

needs_kernels = pytest.mark.skipif(
    not native.is_available(), reason=f"no compiled kernels: {native.unavailable_reason()}"
)


def result(full: Difference, thin: Difference, direct: float = 7.0) -> Routing:
    return Routing(
        num_tokens=64,
        arms={"D": 100.0, "O": 110.0, "R": 118.0, "naive": 40.0},
        full=full,
        sparsity=Difference(10.0, 1.0),
        thin=thin,
        thin_naive=30.0,
        direct=direct,
        parts=dict.fromkeys(PARTS, 1.0),
        naive_parts={"gate": 20.0, "plan": 20.0},
        num_rounds=5,
    )


def test_a_difference_is_of_pairs_and_knows_its_noise():
    choose = random.Random(0)
    base = [choose.uniform(100, 200) for _ in range(400)]
    # The machine drifts, the pairs do not.
    found = difference([value + 5 + choose.gauss(0, 0.5) for value in base], base)
    assert abs(found.median - 5) < found.half_width < 0.2
    assert found.is_resolved
    drowned = difference([value + 5 + choose.gauss(0, 500) for value in base], base)
    assert not drowned.is_resolved
    assert abs(drowned.median - 5) < 1.5 * drowned.half_width
    assert not difference([6.0], [1.0]).is_resolved
    assert not difference([1.0, 1.0], [2.0, 2.0]).is_resolved


def test_the_interval_holds_the_truth_as_often_as_it_says():
    choose = random.Random(1)
    hits = 0
    for _ in range(400):
        found = difference([choose.gauss(3, 1) for _ in range(60)], [0.0] * 60)
        hits += abs(found.median - 3) <= found.half_width
    assert 360 <= hits <= 398


def test_the_overhead_is_the_first_figure_that_is_not_noise_and_says_which():
    clear, noise = Difference(8.0, 1.0), Difference(8.0, 3.0)
    thin = Difference(6.0, 0.5)
    for found, overhead, ratio, words in (
        (result(clear, thin), 8.0, 0.2, "R - O"),
        (result(noise, thin), 6.0, 0.2, "thin"),
        (result(noise, noise), 7.0, 0.175, "call's own time"),
    ):
        assert found.overhead == overhead
        assert words in found.source
        assert as_json([found])["routing_us_per_token"] == {"64": overhead}
        assert as_json([found])["source"] == {"64": found.source}
        assert ratios([found], "int8") == {"decode/int8/t64": ratio}
        assert any(found.source in row for row in table([found], {64: 12.0}))


def test_figures_are_per_token_over_all_layers():
    assert per_token([1e-6, 64e-6], 64) == [pytest.approx(0.5), pytest.approx(32)]


def test_the_widest_format_that_fits_is_taken():
    sizes = [routing_arms.layer_bytes(one) for one in WeightFormat if one.value != "float32"]
    room = 9 * max(sizes)
    assert routing_arms.choose_format(room, 3) is WeightFormat.BFLOAT16
    assert routing_arms.choose_format(room - 1, 3) is WeightFormat.INT8
    assert routing_arms.choose_format(1, 3) is WeightFormat.INT4


@needs_kernels
@pytest.mark.parametrize("weight_format", [WeightFormat.BFLOAT16, WeightFormat.INT4])
def test_arms_compute_the_same_layer(weight_format, monkeypatch):
    sums = []

    def keep(outputs, plan):
        sums.append(routing_arms_combine(outputs, plan))
        return sums[-1]

    routing_arms_combine = routing_arms.combine
    monkeypatch.setattr(routing_arms, "combine", keep)
    weights = routing_arms.Weights(weight_format, 64, 2)
    given = routing_arms.make_inputs(300)[5]
    layer = weights.next_layer()
    other = weights.next_layer()
    assert other.records.data_ptr() == layer.records.data_ptr() + len(layer.records)
    assert weights.next_layer().records.data_ptr() == layer.records.data_ptr()
    planned, routed = (
        arm(layer, given) for arm in (routing_arms.run_planned, routing_arms.run_routed)
    )
    assert torch.equal(sums[0], sums[1])
    assert planned.parts.keys() == {"gather", "combine"}
    assert routed.parts.keys() == {"gather", "combine", "route"}
    assert 0 < routed.parts["route"] < routed.total_s
    assert routing_arms.run_dense(layer, given).total_s > 0


@needs_kernels
def test_a_measurement_has_all_arms_and_is_summed_up(tmp_path):
    weights = routing_arms.Weights(WeightFormat.INT8, 64, 2)
    inputs = routing_arms.make_inputs(4)
    run = routing.cpu_runner(weights, inputs)
    full = routing.measure(routing.CPU_ARMS, run, 0.0)
    thin = routing.measure(routing.THIN_ARMS, run, 0.0)
    assert {len(visits) for visits in (*full.values(), *thin.values())} == {routing.MIN_ROUNDS}
    found = routing.summarise(4, full, thin)
    assert found.arms.keys() == {"D", "O", "R", "naive"}
    assert found.parts.keys() == set(PARTS)
    assert found.parts["gate"] + found.parts["plan"] == pytest.approx(found.direct)
    assert sum(found.naive_parts.values()) == pytest.approx(found.arms["naive"], rel=0.5)
    said = routing_picture.draw([found], {}, "here", tmp_path / "routing.png")
    assert (tmp_path / "routing.png").exists() == said.startswith("Picture")
