"""From log-likelihoods of labels to their probabilities. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label after one prompt."""

    logprob: float
    num_tokens: int


def probabilities(
    scores: Sequence[LabelScore],
    content_free: Sequence[Sequence[LabelScore]],
    *,
    normalizes_length: bool,
) -> list[float]:
    """How likely each label is, given that it is one of them.

    Args:
        scores: The labels after the prompt.
        content_free: The labels after each prompt without content. Where there are any, what a
            label gets by itself is divided out: p / mean of p after these, scaled to sum 1
            (contextual calibration with W = diag(mean)^-1 and b = 0, Zhao et al. 2021,
            arXiv:2102.09690, section 5).
        normalizes_length: Compares log-likelihoods per token.
    """
    logs = _log_probabilities(scores, normalizes_length=normalizes_length)
    if content_free:
        by_prompt = [
            _log_probabilities(one, normalizes_length=normalizes_length) for one in content_free
        ]
        # The mean's constant, 1 / number of prompts, is the same for all labels.
        priors = [_log_sum(of_label) for of_label in zip(*by_prompt, strict=True)]
        logs = [log - prior for log, prior in zip(logs, priors, strict=True)]
        total = _log_sum(logs)
        logs = [log - total for log in logs]
    return [math.exp(log) for log in logs]


def _log_probabilities(scores: Sequence[LabelScore], *, normalizes_length: bool) -> list[float]:
    logs = [
        score.logprob / score.num_tokens if normalizes_length else score.logprob for score in scores
    ]
    total = _log_sum(logs)
    return [log - total for log in logs]


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of the sum of exponentials, whatever their size."""
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))
