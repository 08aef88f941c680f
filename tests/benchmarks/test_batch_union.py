"""The queue in front of a capped batch, on cases that can be reckoned by hand."""

import pytest

from benchmarks.batch_union import BATCHES, by_batch, of_kinds, queue


def test_a_queue_that_is_never_full_waits_for_nobody():
    waited = queue({1: 0.001, 32: 0.001}, cap=1, load=1e-6)
    # A request starts at once: the first token comes after one step, the last after its own ones.
    assert waited.ttft[0] == pytest.approx(0.001, rel=0.01)
    assert waited.completion[0] == pytest.approx(0.064, rel=0.1)


def test_a_cap_that_costs_nothing_per_request_only_makes_others_wait():
    free = {1: 1.0, 32: 1.0}
    waits = [queue(free, cap, load=0.2).ttft[0] for cap in (2, 8, 32)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 10 * waits[2]


def test_steps_that_cost_as_much_as_their_requests_gain_nothing_from_a_batch():
    linear = {1: 1.0, 32: 32.0}
    [one, all_of_them] = [queue(linear, cap, load=0.5).completion[0] for cap in (1, 32)]
    assert one == pytest.approx(all_of_them, rel=0.3)


def test_larger_batches_share_what_they_read():
    reads = by_batch("uniform", num_slots=128)
    assert list(reads) == list(BATCHES)
    # Nearly 8 of 8 experts a layer, 4 of which have a slot, shared by 32 requests: 4 * 32 / 32.
    assert reads[32] == pytest.approx(4.0, rel=0.05)
    # Two of 8 a token and layer, half of them there.
    assert reads[1] == pytest.approx(32.0, rel=0.05)


def test_kinds_are_mixed_in_every_step_or_take_turns():
    mixed, in_turns = (of_kinds(8, 70, together=together) for together in (False, True))
    assert mixed.num_tokens == in_turns.num_tokens == 8 * 70
    assert len(mixed.calls) == len(in_turns.calls) == 32 * 70
    touched = [sum(len(experts) for _, experts in one.calls) for one in (mixed, in_turns)]
    assert touched[1] < 0.95 * touched[0]
