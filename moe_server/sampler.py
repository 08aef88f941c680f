"""From logits to tokens.

A sampled token depends on its own logits, the request's seed and its number in the completion, and
on nothing else: the draw is counter-based (Philox, keyed by the seed), so neighbours in the batch,
chunking or a restart do not change it.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from moe_server.messages import Sampling
from moe_server.sequence import Sequence


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
        logits: float32 (rows, vocab_size), one row a request, in their order.
        sequences: The requests.
    """
    greedy = logits.argmax(dim=-1).tolist()
    sampled = []
    for row, sequence, best in zip(logits, sequences, greedy, strict=True):
        sampling = sequence.request.sampling
        token_id = best
        if sampling.temperature > 0 or sampling.repetition_penalty != 1:
            penalised = _penalise(row, sequence.token_ids, sampling.repetition_penalty)
            token_id = int(penalised.argmax())
            if sampling.temperature > 0:
                token_id = _draw(penalised, sampling, sequence.num_completion_tokens)
        sampled.append(_with_logprobs(token_id, row, sequence.request.logprobs))
    return sampled


def _with_logprobs(token_id: int, row: torch.Tensor, num_top: int) -> Sampled:
    if num_top < 0:
        return Sampled(token_id)
    logprobs = row.log_softmax(dim=-1)
    top = logprobs.topk(min(num_top, len(row)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Sampled(token_id, float(logprobs[token_id]), tuple(pairs))


def _penalise(row: torch.Tensor, token_ids: Rows[int], penalty: float) -> torch.Tensor:
    """Makes tokens that were already there less likely (Keskar et al., 2019, arXiv:1909.05858)."""
    if penalty == 1:
        return row
    seen = torch.tensor(sorted(set(token_ids)), device=row.device)
    row = row.clone()
    values = row[seen]
    row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return row


def _draw(row: torch.Tensor, sampling: Sampling, number: int) -> int:
    """Draws token `number` of a completion from the filtered distribution.

    Filters apply in the order top_k, top_p, min_p, each to the distribution the one before left.
    In float64, most likely first; equal logits keep the order of their ids.
    """
    logits, order = torch.sort(row.double() / sampling.temperature, descending=True, stable=True)
    if 0 < sampling.top_k < len(logits):
        logits = logits[: sampling.top_k]
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        # Those that do not reach top_p together, and the one that does.
        num_below = int((probabilities.cumsum(dim=-1) < sampling.top_p).sum())
        probabilities = probabilities[: num_below + 1]
    # They descend: what min_p drops is a tail, and the first always stays.
    probabilities = probabilities[probabilities >= sampling.min_p * probabilities[0]]
    cumulative = probabilities.cumsum(dim=-1)
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=[number, 0, 0, 0]))
    point = generator.random() * float(cumulative[-1])
    chosen = int(torch.searchsorted(cumulative, point, right=True))
    return int(order[min(chosen, len(cumulative) - 1)])
