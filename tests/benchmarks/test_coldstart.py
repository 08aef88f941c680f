"""The arithmetic of the cold start's bars, and what an observer sees."""

from dataclasses import replace

import pytest

from benchmarks.coldstart_first import First, first_over_steady, percentile
from benchmarks.coldstart_hotset import (
    NUM_TOPICS,
    HotSet,
    Looked,
    Pair,
    topics,
    until_settled,
)
from benchmarks.coldstart_ready import Start, limit_s, worst_ratio
from benchmarks.observer import Moment, stages

START = Start(
    arm="half",
    ready_s=9.0,
    port_s=0.6,
    model_bytes=12 * 10**9,
    read_bytes=24 * 10**9,
    kernel_s=1.0,
    disk_bytes_per_s=2e9,
    stages_s={},
    slots=16,
    faults=[],
)


def test_the_limit_is_what_the_disk_takes_and_a_share_and_two_seconds() -> None:
    assert limit_s(12e9, 2e9) == pytest.approx(1.15 * 6 + 2)
    assert START.ratio == pytest.approx(9 / 8.9)
    assert START.ratio_as_read == pytest.approx(9 / 15.8)


def test_the_worse_arm_counts_by_its_median() -> None:
    whole = [replace(START, arm="whole", ready_s=ready_s) for ready_s in (8.9, 17.8, 89.0)]
    assert worst_ratio([START, *whole]) == pytest.approx(2.0)
    assert worst_ratio([START, replace(START, arm="whole", ready_s=1.0)]) == START.ratio


def test_first_requests_are_compared_with_the_later_half() -> None:
    assert first_over_steady([3.0, 9.0, 9.0, 1.0, 2.0, 1.5]) == pytest.approx(2.0)
    first = First("half", 3000.0, [[1.1, 1.0], [1.3, 1.0], [1.2, 1.0]], [20.0, 1.0, 1.0, 1.0])
    assert first.ratio == pytest.approx(1.2)
    assert first.p99_ms == pytest.approx(1300)
    assert first.within_limit
    assert not replace(first, max_ttft_ms=1200.0).within_limit
    assert first.unwarmed_ratio == pytest.approx(20)


def test_percentiles_are_values_that_occurred() -> None:
    hundred = [float(value) for value in range(100, 0, -1)]
    assert percentile(hundred, 0.99) == 99
    assert percentile(hundred, 1.0) == 100
    assert percentile([5.0], 0.99) == 5
    assert percentile([1.0] * 30 + [7.0], 0.99) == 7


def looked(*missing: int) -> list[Looked]:
    """Requests that want 8 experts each."""
    return [Looked(8 - one, one) for one in missing]


def test_a_server_has_settled_when_its_next_window_hits_as_often_as_the_settled_one_s() -> None:
    settled = looked(*[1] * 20)
    slow = looked(*[5] * 6, *[1] * 14)
    assert until_settled(slow, settled, window=16) == 7 * 8
    assert until_settled(settled, settled, window=16) == 8
    # A single good request is no window, and a request that is hard for both is no fault.
    assert until_settled(looked(*[0, 8] * 10), settled, window=16) == 20 * 8
    assert until_settled(looked(8, *[1] * 19), looked(8, *[1] * 19), window=16) == 8
    # What is left at the end is too short to tell.
    assert until_settled(looked(*[8] * 19, 0), settled, window=16) == 20 * 8


def test_the_speedup_is_the_median_over_sequences() -> None:
    settled = looked(*[1] * 20)
    pairs = [
        Pair(16, settled, looked(*[5] * number, *[1] * (20 - number)), settled)
        for number in (1, 4, 9)
    ]
    found = HotSet(pairs, uniform_rate=0.5)
    assert found.settled_rate == pytest.approx(7 / 8)
    assert (found.wanted_with, found.wanted_without) == (8, 40)
    assert found.speedup == pytest.approx(5)


def test_traffic_is_skewed_and_its_topics_are_the_same_for_every_seed() -> None:
    one, other = topics("one", 2000), topics("other", 2000)
    tokens = {prompt[0] for prompt in one}
    assert len(tokens) == NUM_TOPICS
    assert tokens == {prompt[0] for prompt in other}
    counts = sorted((sum(prompt[0] == token for prompt in one) for token in tokens), reverse=True)
    assert counts[0] > 0.3 * len(one)
    assert [prompt[0] for prompt in one[:20]] != [prompt[0] for prompt in other[:20]]


def test_stages_end_where_the_next_begins() -> None:
    moments = [
        Moment(10.0),
        Moment(10.5, "starting", "the engine"),
        Moment(11.0, "loading", "experts", stage_index=2),
        Moment(14.0, "starting", "the engine"),
        Moment(14.25, "ready", "", is_ready=True),
    ]
    seconds = {"unreachable": 0.5, "starting: the engine": 0.75, "loading: experts": 3.0}
    assert stages(moments, 14.25) == pytest.approx(seconds)


def test_a_moment_is_the_same_while_only_bytes_come() -> None:
    moment = Moment(1.0, "loading", "experts", bytes_done=5)
    assert moment.same_as(replace(moment, at_s=2.0, bytes_done=7, bytes_per_s=2.0))
    assert not moment.same_as(replace(moment, is_ready=True))
    probe = Moment(1.0, "warming", "round 1: probe 2 of 3", failures=("too slow",))
    assert probe.place == "warming: round #: probe # of #"
    assert probe.text == "round 1: probe 2 of 3 | too slow"
