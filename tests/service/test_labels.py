"""Probabilities of labels, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_server.service.labels import LabelScore, probabilities


def scores(*pairs: tuple[float, int]) -> list[LabelScore]:
    return [LabelScore(math.log(chance), count) for chance, count in pairs]


def test_probabilities_are_relative():
    found = probabilities(scores((0.1, 1), (0.3, 2)), [], normalizes_length=False)
    assert found == pytest.approx([0.25, 0.75])


def test_lengths_are_normalised_by_the_geometric_mean():
    found = probabilities(scores((0.25, 1), (0.25, 2)), [], normalizes_length=True)
    assert found == pytest.approx([1 / 3, 2 / 3])


def test_calibration_divides_by_the_mean_after_prompts_without_content():
    content_free = [scores((0.8, 1), (0.2, 1)), scores((0.2, 1), (0.2, 1))]  # means 0.65, 0.35
    found = probabilities(scores((0.6, 1), (0.4, 1)), content_free, normalizes_length=False)
    first, second = 0.6 / 0.65, 0.4 / 0.35
    assert found == pytest.approx([first / (first + second), second / (first + second)])


def test_what_is_as_likely_without_content_is_undecided():
    found = probabilities(
        scores((0.9, 1), (0.1, 3)), [scores((0.9, 1), (0.1, 3))], normalizes_length=True
    )
    assert found == pytest.approx([0.5, 0.5])


@given(st.lists(st.floats(-5000, 0), min_size=2, max_size=9), st.booleans())
def test_they_sum_to_one_however_unlikely(logprobs, normalizes):
    labels = [LabelScore(logprob, 3) for logprob in logprobs]
    found = probabilities(labels, [labels[::-1]], normalizes_length=normalizes)
    assert math.fsum(found) == pytest.approx(1)
    assert all(0 <= chance <= 1 for chance in found)
