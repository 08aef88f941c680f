"""Draws against the probabilities they claim, filters against a brute-force reference."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from moe_server.messages import Sampling, Submit
from moe_server.sampler import sample
from moe_server.sequence import Sequence


def make(sampling=Sampling(), number=0, logprobs=-1, prompt=(0,)) -> Sequence:  # noqa: B008
    """A request about to get token `number` of its completion."""
    sequence = Sequence.of(Submit(0, list(prompt), 10**6, [], sampling, logprobs), now=0.0)
    sequence.token_ids += [0] * number
    return sequence


def draws(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    rows = logits.expand(len(sequences), -1)
    return [choice.token_id for choice in sample(rows, sequences)]


def filtered(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """token id -> probability, one filter after the other, in words rather than in tensors."""
    weights = {
        token: np.exp((logit - max(logits)) / sampling.temperature)
        for token, logit in enumerate(logits)
    }
    likely_first = sorted(weights, key=lambda token: (-weights[token], token))
    if sampling.top_k:
        likely_first = likely_first[: sampling.top_k]
    total = sum(weights[token] for token in likely_first)
    kept, reached = [], 0.0
    for token in likely_first:
        if kept and reached >= sampling.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    best = weights[kept[0]]
    kept = [token for token in kept if weights[token] >= sampling.min_p * best]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def assert_distributed(drawn: list[int], expected: dict[int, float]) -> None:
    """Chi-square, at six standard deviations; what is not expected must not occur."""
    counts = {token: drawn.count(token) for token in set(drawn)}
    assert counts.keys() <= expected.keys(), "drew a token that the filters drop"
    likely = {token: p * len(drawn) for token, p in expected.items() if p * len(drawn) >= 5}
    rest = sum(count for token, count in counts.items() if token not in likely)
    cells = [(counts.get(token, 0), mean) for token, mean in likely.items()]
    if len(drawn) - sum(likely.values()) > 1:
        cells.append((rest, len(drawn) - sum(likely.values())))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = len(cells) - 1
    assert chi_square <= degrees + 6 * max(1, 2 * degrees) ** 0.5, (counts, expected)


DISTRIBUTIONS = {
    "plain": Sampling(temperature=1.0),
    "cold": Sampling(temperature=0.4),
    "hot": Sampling(temperature=3.0),
    "top_k": Sampling(temperature=1.0, top_k=4),
    "top_p": Sampling(temperature=1.0, top_p=0.7),
    "min_p": Sampling(temperature=1.0, min_p=0.2),
    "all": Sampling(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1),
}
LOGITS = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 1.5


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("axis", ["seeds", "tokens of one completion"])
def test_draws_follow_their_distribution(name, axis):
    base = DISTRIBUTIONS[name]
    fields = {key: getattr(base, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    sequences = [
        make(Sampling(**fields, seed=number)) if axis == "seeds" else make(base, number)
        for number in range(1200)
    ]
    assert_distributed(draws(LOGITS, sequences), filtered(LOGITS[0].tolist(), base))


def test_successive_tokens_are_independent():
    sequences = [make(Sampling(temperature=1.0, seed=5), number) for number in range(1500)]
    drawn = draws(torch.zeros(1, 3), sequences)
    pairs = [3 * first + second for first, second in itertools.pairwise(drawn)]
    assert_distributed(pairs, dict.fromkeys(range(9), 1 / 9))
    # And so are the completions of neighbouring seeds.
    others = [make(Sampling(temperature=1.0, seed=6), number) for number in range(1500)]
    both = [3 * a + b for a, b in zip(drawn, draws(torch.zeros(1, 3), others), strict=True)]
    assert_distributed(both, dict.fromkeys(range(9), 1 / 9))


@given(
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.33, 0.77, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.049, 0.31, 1.0]),
)
@settings(max_examples=60)
def test_filters_keep_what_the_reference_keeps(logits, temperature, top_k, top_p, min_p):
    """Few distinct logits: ties abound, and keep the order of their ids."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = filtered(logits, sampling)
    sequences = [make(sampling, number) for number in range(40)]
    drawn = set(draws(torch.tensor([logits]), sequences))
    assert drawn <= expected.keys()
    missed = set(expected) - drawn
    # 40 draws miss a token of this probability once in 10**9.
    assert all(expected[token] < 0.4 for token in missed)


def drawn_by_hand(kept: list[tuple[int, float]], sampling: Sampling, number: int) -> int:
    """The point that the seed names on (token, probability), laid end to end."""
    counter = [number, sampling.sample_index, 0, 0]
    point = np.random.Generator(np.random.Philox(key=sampling.seed, counter=counter)).random()
    reached = 0.0
    for token, probability in kept:
        reached += probability
        if point < reached:
            return token
    return kept[-1][0]


@given(
    seed=st.integers(0, 2**64 - 1),
    levels=st.integers(1, 6),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    top_k=st.sampled_from([0, 0, 1, 50, 1500]),
    top_p=st.sampled_from([1.0, 1.0, 0.3137, 0.9371, 0.99991]),
    min_p=st.sampled_from([0.0, 0.0, 0.0713]),
    sample_index=st.integers(0, 3),
)
@settings(max_examples=30)
def test_the_token_of_a_seed_is_the_reference_s(
    seed, levels, spread, top_k, top_p, min_p, sample_index
):
    """Flat distributions, with a nucleus of thousands, and steep ones; ties abound."""
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randint(0, levels, (1, 3000), generator=generator) * spread
    sampling = Sampling(0.8, top_k, top_p, min_p, seed, sample_index=sample_index)
    sequences = [make(sampling, number) for number in range(4)]
    kept = sorted(filtered(logits[0].tolist(), sampling).items())
    expected = [drawn_by_hand(kept, sampling, number) for number in range(4)]
    assert draws(logits, sequences) == expected


def test_samples_of_a_seed_are_independent():
    first, second = (
        draws(
            torch.zeros(1, 3),
            [make(Sampling(1.0, seed=5, sample_index=index), number) for number in range(1500)],
        )
        for index in range(2)
    )
    pairs = [3 * a + b for a, b in zip(first, second, strict=True)]
    assert_distributed(pairs, dict.fromkeys(range(9), 1 / 9))


def test_of_many_equal_logits_top_k_keeps_the_first():
    sampling = Sampling(temperature=1.0, top_k=3)
    drawn = draws(torch.zeros(1, 32_000), [make(sampling, number) for number in range(60)])
    assert set(drawn) == {0, 1, 2}


def test_greedy_takes_the_largest_and_of_equals_the_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -4.0, -9.0, -4.5]])
    assert [choice.token_id for choice in sample(logits, [make()] * 3)] == [1, 0, 1]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_a_draw_depends_on_its_own_request_alone(seed):
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(20, 50, generator=generator)
    fields = {"temperature": 1.2, "top_k": 30, "top_p": 0.95}
    sequences = [make(Sampling(**fields, seed=seed), number) for number in range(20)]
    together = [choice.token_id for choice in sample(rows, sequences)]
    order = choose.sample(range(20), 20)
    shuffled = sample(rows[order], [sequences[number] for number in order])
    assert [choice.token_id for choice in shuffled] == [together[number] for number in order]
    alone = [
        sample(rows[number : number + 1], [sequences[number]])[0].token_id for number in range(20)
    ]
    assert alone == together
    other_seed = [make(Sampling(**fields, seed=seed ^ 1), number) for number in range(20)]
    assert [choice.token_id for choice in sample(rows, other_seed)] != together


def test_drawing_does_not_touch_the_random_state_of_others():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draws(LOGITS, [make(Sampling(temperature=1.0))])
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_extreme_temperatures():
    cold = [make(Sampling(temperature=1e-6, seed=seed)) for seed in range(200)]
    assert set(draws(LOGITS * 20, cold)) == {int(LOGITS.argmax())}
    hot = Sampling(temperature=100.0)
    many = [make(Sampling(temperature=100.0, seed=seed)) for seed in range(800)]
    assert_distributed(draws(LOGITS, many), filtered(LOGITS[0].tolist(), hot))
    coldest = [make(Sampling(temperature=1e-6, seed=seed)) for seed in range(400)]
    assert_distributed(draws(torch.tensor([[0.0, 7.0, 7.0, 1.0]]), coldest), {1: 0.5, 2: 0.5})


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_most_extreme_repetition_penalty_leaves_finite_scores(penalty, temperature):
    logits = torch.tensor([[3e38, 1e38, -1e38, -3e38, 0.0]])
    prompt = [0, 1, 2, 3, 4]
    with np.errstate(all="raise", under="ignore"):
        many = [
            make(Sampling(temperature, repetition_penalty=penalty, seed=seed), prompt=prompt)
            for seed in range(20)
        ]
        drawn = set(draws(logits, many))
    # The two largest become the largest number there is.
    assert drawn <= ({0, 1} if penalty < 1 else {0})


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_repetition_penalty_is_transformers(penalty, seed):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 30, generator=generator)
    logits[0, 3] = 0.0
    tokens = [choose.randrange(30) for _ in range(12)] + [3]
    sequence = make(Sampling(repetition_penalty=penalty), prompt=tokens[:5])
    sequence.token_ids[5:] = tokens[5:]
    untouched = logits.clone()
    penalised = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    assert sample(logits, [sequence])[0].token_id == int(penalised.argmax())
    assert torch.equal(logits, untouched)
    # Sampling sees the penalised scores too.
    hot = {"temperature": 1.0, "repetition_penalty": penalty}
    many = [make(Sampling(**hot, seed=number), prompt=tokens) for number in range(300)]
    assert_distributed(draws(logits, many), filtered(penalised[0].tolist(), Sampling(1.0)))


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-0.5, 1.1)])
def test_presence_and_frequency_count_the_completion_only(presence, frequency):
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    sequence = make(sampling, prompt=(3, 3, 3, 1))
    logits = torch.tensor([[1.0, 1.5, 1.9, 2.0]])
    assert sample(logits, [sequence])[0].token_id == 3
    sequence.token_ids += [3, 2, 3]
    expected = logits[0] - torch.tensor([0, 0, frequency + presence, 2 * frequency + presence])
    untouched = logits.clone()
    assert sample(logits, [sequence])[0].token_id == int(expected.argmax())
    assert torch.equal(logits, untouched)
    many = [
        make(Sampling(1.0, seed=n, presence_penalty=presence, frequency_penalty=frequency), 2)
        for n in range(500)
    ]
    for one in many:
        one.token_ids[-2:] = [1, 1]
    by_hand = logits[0] - torch.tensor([0, 2 * frequency + presence, 0, 0])
    assert_distributed(draws(logits, many), filtered(by_hand.tolist(), Sampling(1.0)))


class Allowing:
    """Stands in for a matcher."""

    def __init__(self, *token_ids: int, vocab_size: int = 12) -> None:
        self.allowed = np.isin(np.arange(vocab_size), token_ids)


def allow(sequence: Sequence, *token_ids: int) -> Sequence:
    sequence.matcher = Allowing(*token_ids)
    return sequence


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_constraint_comes_before_temperature_and_filters(name):
    base, allowed = DISTRIBUTIONS[name], (1, 4, 5, 9, 10, 11)
    fields = {key: getattr(base, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    sequences = [allow(make(Sampling(**fields, seed=n)), *allowed) for n in range(1200)]
    expected = filtered([LOGITS[0, token].item() for token in allowed], base)
    drawn = draws(LOGITS, sequences)
    assert_distributed(drawn, {allowed[token]: p for token, p in expected.items()})
    least = int(LOGITS.argmin())
    alone = [allow(make(Sampling(**fields, seed=n)), least) for n in range(20)]
    assert set(draws(LOGITS, alone)) == {least}


def test_greedy_takes_the_best_that_is_allowed_and_neighbours_theirs():
    best = LOGITS[0].argsort(descending=True).tolist()
    sequences = [make(), allow(make(), *best[3:]), allow(make(), best[-1]), make()]
    assert draws(LOGITS, sequences) == [best[0], best[3], best[-1], best[0]]


def test_log_probabilities_are_those_of_the_model_itself():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 40, generator=generator) * 4
    expected = rows.double().log_softmax(-1)
    sampling = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.5, seed=3)
    for choice, row in zip(sample(rows, [make(sampling, logprobs=6)] * 4), expected, strict=True):
        assert choice.logprob == pytest.approx(float(row[choice.token_id]), abs=1e-5)
        assert [token for token, _ in choice.top_logprobs] == row.topk(6).indices.tolist()
        assert [value for _, value in choice.top_logprobs] == pytest.approx(
            row.topk(6).values.tolist(), abs=1e-5
        )
    [none, only_chosen, more_than_all] = sample(
        rows[:3], [make(logprobs=-1), make(logprobs=0), make(logprobs=100)]
    )
    assert (none.logprob, none.top_logprobs) == (None, ())
    assert only_chosen.logprob is not None
    assert only_chosen.top_logprobs == ()
    assert sorted(token for token, _ in more_than_all.top_logprobs) == list(range(40))


def test_an_empty_step_samples_nothing():
    assert sample(torch.empty(0, 10), []) == []
