"""From logits to tokens.

A sampled token depends on its own logits, the request's seed, the sample's index and the token's
number in the completion, and on nothing else: the draw is counter-based (Philox, keyed by the
seed), so neighbours in the batch, chunking or a restart do not change it.

Greedy rows without changes are one argmax where the logits are. All others are chosen on the
host, in numpy: penalties, then the constraint's mask, then the temperature and the filters, which
leave a set of tokens, then a draw from that set in order of ids. No step sorts the vocabulary but
top_p, and that only as much of it as carries the probability.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from moe_server.logprobs import Scores, log_softmax
from moe_server.messages import Sampling
from moe_server.sequence import Sequence

Weights: TypeAlias = npt.NDArray[np.float64]
"""Unnormalised probabilities; the most likely token's is 1."""
Ids: TypeAlias = npt.NDArray[np.int64]

LARGEST = np.finfo(np.float32).max
FIRST_NUCLEUS = 1024
"""Tokens among which top_p is looked for first; then four times as many, and so on."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token. Log-probabilities are of the model's own distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
    """Chooses the next token of each request.

    Args:
        logits: float32 (rows, vocab_size), one row a request, in their order; finite.
        sequences: The requests.
    """
    greedy = _most_likely(logits)
    sampled = []
    for row, sequence, best in zip(logits, sequences, greedy, strict=True):
        token_id, num_logprobs = best, sequence.request.logprobs
        is_changed = _is_changed(sequence)
        if not is_changed and num_logprobs < 0:
            sampled.append(Sampled(best))
            continue
        own: Scores = row.cpu().numpy()
        if is_changed:
            scores = _constrain(_penalise(own, sequence), sequence)
            token_id = _choose(scores, sequence)
        sampled.append(_with_logprobs(token_id, own, num_logprobs))
    return sampled


def _most_likely(logits: torch.Tensor) -> list[int]:
    """Each row's; of equal ones the first."""
    chosen: list[int]
    if logits.device.type == "cpu":
        # 32 rows of 32,000 take numpy 0.13 ms, and torch 1.6 (PyTorch 2.13, AVX-512).
        chosen = logits.numpy().argmax(axis=-1).tolist()
        return chosen
    chosen = logits.argmax(dim=-1).tolist()
    return chosen


def _is_changed(sequence: Sequence) -> bool:
    """Whether the choice can differ from the model's most likely token."""
    sampling = sequence.request.sampling
    return (
        sampling.temperature > 0
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sequence.matcher is not None
    )


def _penalise(scores: Scores, sequence: Sequence) -> Scores:
    """Makes tokens that were already there less likely.

    Repetition counts the prompt too (Keskar et al., 2019, arXiv:1909.05858); presence and frequency
    count the completion only, as in OpenAI's and vLLM's interfaces.
    """
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1:
        scores, penalty = scores.copy(), np.float32(sampling.repetition_penalty)
        seen = np.unique(np.array(sequence.token_ids))
        # In float64 nothing overflows, and what fits float32 is rounded as float32 would have.
        values = scores[seen].astype(np.float64)
        values = np.where(values > 0, values / penalty, values * penalty)
        scores[seen] = np.clip(values, -LARGEST, LARGEST)
    num_completion = sequence.num_completion_tokens
    if num_completion and (sampling.presence_penalty or sampling.frequency_penalty):
        scores = scores.copy()
        seen, counts = np.unique(np.array(sequence.token_ids[-num_completion:]), return_counts=True)
        subtrahend = sampling.presence_penalty + sampling.frequency_penalty * counts
        scores[seen] -= subtrahend.astype(np.float32)
    return scores


def _constrain(scores: Scores, sequence: Sequence) -> Scores:
    """Leaves only what the request's constraint allows next; that is never nothing."""
    if sequence.matcher is None:
        return scores
    return np.where(sequence.matcher.allowed, scores, np.float32(-np.inf))


def _choose(scores: Scores, sequence: Sequence) -> int:
    sampling = sequence.request.sampling
    if sampling.temperature == 0:
        return int(scores.argmax())
    return _draw(scores, sampling, sequence.num_completion_tokens)


def _draw(scores: Scores, sampling: Sampling, number: int) -> int:
    """Draws token `number` of a completion from the filtered distribution.

    Filters apply in the order top_k, top_p, min_p, each to the distribution the one before left; of
    equal scores the lower ids are kept. In float64. What is kept is laid end to end in order of ids
    and the draw is a point on it.
    """
    ids: Ids | None = None
    if 0 < sampling.top_k < len(scores):
        ids = _largest(scores, sampling.top_k)
        scores = scores[ids]
    weights: Weights = scores.astype(np.float64)
    weights -= weights.max()
    weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1:
        nucleus = _nucleus(weights, sampling.top_p)
        weights, ids = weights[nucleus], nucleus if ids is None else ids[nucleus]
    if sampling.min_p > 0:
        likely = np.flatnonzero(weights >= sampling.min_p)
        weights, ids = weights[likely], likely if ids is None else ids[likely]
    cumulative = weights.cumsum()
    counter = [number, sampling.sample_index, 0, 0]
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=counter))
    point = generator.random() * cumulative[-1]
    # A point that was rounded up to the very end belongs to the last token that has a probability.
    end = cumulative.searchsorted(cumulative[-1], side="left")
    chosen = min(cumulative.searchsorted(point, side="right"), end)
    return int(chosen if ids is None else ids[chosen])


def _nucleus(weights: Weights, top_p: float) -> Ids:
    """Ascending indices of the fewest weights that together reach `top_p` of all."""
    goal, size = top_p * weights.sum(), FIRST_NUCLEUS
    while True:
        candidates = _largest(weights, size)
        likely_first = candidates[np.argsort(-weights[candidates], kind="stable")]
        cumulative = weights[likely_first].cumsum()
        if cumulative[-1] >= goal or len(candidates) == len(weights):
            # Those that do not reach it together, and the one that does.
            num_below = int(cumulative.searchsorted(goal, side="left"))
            return np.sort(likely_first[: num_below + 1])
        size *= 4


def _largest(values: npt.NDArray[Any], count: int) -> Ids:
    """Ascending indices of the `count` largest values, or of all; of equal ones the first."""
    if count >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > threshold)
    ties = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate((above, ties)))


def _with_logprobs(token_id: int, row: Scores, num_top: int) -> Sampled:
    """Adds log-probabilities before penalties, constraint, temperature and filters."""
    if num_top < 0:
        return Sampled(token_id)
    logprobs = log_softmax(row)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        largest = _largest(row, num_top)
        likely_first = largest[np.argsort(-row[largest], kind="stable")]
        top = tuple(zip(likely_first.tolist(), logprobs[likely_first].tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)
