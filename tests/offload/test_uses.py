import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_server.offload.layout import ExpertId
from moe_server.offload.uses import HALF_LIFE_VISITS, Uses

NUM_LAYERS, NUM_EXPERTS = 3, 5

VISITS = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, max_size=NUM_EXPERTS),
    ),
    max_size=60,
)


def noted(visits) -> Uses:
    uses = Uses(NUM_LAYERS, NUM_EXPERTS)
    for layer, experts in visits:
        uses.note(layer, experts)
    return uses


def by_definition(visits, layer: int) -> tuple[float, list[float]]:
    """Visits and shares of a layer, each visit halved for every half-life since."""
    of_layer = [experts for visited, experts in visits if visited == layer and experts]
    weights = [0.5 ** (age / HALF_LIFE_VISITS) for age in range(len(of_layer), 0, -1)]
    total = sum(weights)
    uses = [
        sum(weight for weight, experts in zip(weights, of_layer, strict=True) if one in experts)
        for one in range(NUM_EXPERTS)
    ]
    return total, [use / total if total else 0.0 for use in uses]


@given(VISITS)
def test_counts_are_what_their_definition_says(visits):
    uses = noted(visits)
    assert uses.num_noted == sum(bool(experts) for _, experts in visits)
    for layer in range(NUM_LAYERS):
        total, shares = by_definition(visits, layer)
        assert uses.visits()[layer] == pytest.approx(total)
        assert uses.shares()[layer] == pytest.approx(shares)
        for one, share in enumerate(shares):
            assert uses.share(ExpertId(layer, one)) == pytest.approx(share)


@given(VISITS, VISITS)
def test_what_was_saved_goes_on_where_it_was(before, after):
    first = noted(before)
    second = Uses(NUM_LAYERS, NUM_EXPERTS)
    second.restore(first.visits(), first.shares())
    for layer, experts in after:
        second.note(layer, experts)
    whole = noted([*before, *after])
    for layer in range(NUM_LAYERS):
        assert second.visits()[layer] == pytest.approx(whole.visits()[layer])
        assert second.shares()[layer] == pytest.approx(whole.shares()[layer])


@given(VISITS)
def test_any_beginning_of_the_ranking_is_an_equal_share_of_the_hottest(visits):
    uses = noted(visits)
    ranked = uses.ranked()
    assert len(set(ranked)) == len(ranked) == NUM_LAYERS * NUM_EXPERTS
    for length in range(len(ranked)):
        for layer in range(NUM_LAYERS):
            kept = [uses.share(one) for one in ranked[:length] if one.layer == layer]
            left = [uses.share(one) for one in ranked[length:] if one.layer == layer]
            assert length // NUM_LAYERS <= len(kept) <= -(-length // NUM_LAYERS)
            assert kept == sorted(kept, reverse=True)
            assert min(kept, default=1.0) >= max(left, default=0.0)


def test_of_equals_the_lower_number_comes_first():
    assert Uses(2, 2).ranked() == [ExpertId(layer, one) for one in range(2) for layer in range(2)]
    assert Uses(2, 0).ranked() == Uses(0, 0).ranked() == []


def test_later_traffic_outweighs_earlier_after_some_half_lives_and_numbers_stay_finite(monkeypatch):
    monkeypatch.setattr("moe_server.offload.uses._RESCALE_AT", 4.0)
    uses = Uses(1, 2)
    for _ in range(8 * HALF_LIFE_VISITS):
        uses.note(0, [0])
    for _ in range(2 * HALF_LIFE_VISITS):
        uses.note(0, [1])
    assert uses.shares()[0] == pytest.approx([0.25, 0.75], abs=0.01)
    assert uses.visits()[0] == pytest.approx(HALF_LIFE_VISITS / 0.693, rel=0.01)
