"""What a request reads out of the model that generates nothing.

Log-probabilities of given tokens, or the mean of the last hidden states of all of its tokens. Both
are gathered chunk by chunk while the prompt is prefilled, and are the same bit for bit however it
is cut, interrupted and resumed. `Readout` is one request's; `ReadoutTaps` sits in the model and
brings it its rows. Knows no scheduling; `sequence`, `model` and `engine` use it.

Shape legend: T rows of a step, R rows of logits at a time, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_server.errors import MoeServerError, Reason
from moe_server.logprobs import Scores, log_softmax
from moe_server.messages import Submit, TargetScore

FRACTION = 2.0**28
"""Hidden states are added up as integers, multiples of its inverse: those have the same sum in any
order. A million tokens' worth of MAX_HIDDEN fits 63 bits."""
MAX_HIDDEN = 2.0**15
POOLED_ROWS = 32
"""Rows that are widened to float64 and int64 at a time."""


def not_finite() -> MoeServerError:
    """The refusal of numbers that nothing can be told from."""
    return MoeServerError(
        "The model produced logits that are not finite.",
        "Check the checkpoint; float16 overflows where bfloat16 does not.",
        reason=Reason.UNSUPPORTED,
    )


class Readout:
    """What has been read for one request so far."""

    def __init__(self, request: Submit) -> None:
        self._targets = request.targets
        self._pools = request.pools
        self._num_tokens = len(request.token_ids)
        self._scores: list[TargetScore | None] = [None] * len(request.targets)
        self._sum_H: torch.Tensor | None = None
        self.is_broken = False
        """Something was not finite."""

    @property
    def num_reusable(self) -> int:
        """The first tokens that nothing is read from: they need not be computed."""
        return 0 if self._pools else self._num_tokens - len(self._targets)

    @property
    def scores(self) -> list[TargetScore]:
        """Of all targets, in order; once all tokens were computed."""
        return [score for score in self._scores if score is not None]

    @property
    def embedding(self) -> list[float]:
        """The mean of all hidden states, scaled to length 1; empty where it was not asked for."""
        if self._sum_H is None:
            return []
        mean_H = self._sum_H.double() / (FRACTION * self._num_tokens)
        norm = mean_H.norm()
        return (mean_H / norm if norm > 0 else mean_H).float().tolist()

    def take_hidden(self, first: int, hidden_TH: torch.Tensor) -> None:
        """Adds up the hidden states of the tokens from position `first` on."""
        if not self._pools:
            return
        if first == 0:  # the beginning, or the beginning again after a preemption
            self._sum_H = None
        for begin in range(0, len(hidden_TH), POOLED_ROWS):
            wide_TH = hidden_TH[begin : begin + POOLED_ROWS].double()
            if not bool((wide_TH.abs() < MAX_HIDDEN).all()):
                self.is_broken = True
                return
            sum_H = (wide_TH * FRACTION).round_().long().sum(0)
            self._sum_H = sum_H if self._sum_H is None else self._sum_H + sum_H

    def positions(self, first: int, num_tokens: int) -> range:
        """The positions among the `num_tokens` from `first` on whose logits are wanted."""
        return range(max(first, self.num_reusable), first + num_tokens if self._targets else 0)

    def take_logits(self, position: int, logits_V: Scores) -> None:
        """Scores the target that this position is followed by."""
        if not np.isfinite(logits_V).all():
            self.is_broken = True
            return
        number = position - self.num_reusable
        target = self._targets[number]
        is_greedy = bool(logits_V.argmax() == target)
        logprob = float(log_softmax(logits_V)[target])
        self._scores[number] = TargetScore(logprob, is_greedy)


@dataclass(frozen=True, slots=True)
class ReadoutRows:
    """Which rows of a step are a request's."""

    readout: Readout
    start: int
    """Its first row."""
    first: int
    """That row's position in the request."""
    num_tokens: int


class ReadoutTaps:
    """Takes hidden states behind the final norm, and logits of more rows than the step returns.

    Args:
        module: The model; its hooks are registered before DeepSpeed's, so they see its weights.
        rows_at_once: As many rows of logits are held at a time.
    """

    def __init__(self, module: nn.Module, rows_at_once: int) -> None:
        self._rows_at_once = rows_at_once
        self._parts: Sequence[ReadoutRows] = ()
        self._hidden_TH: torch.Tensor | None = None
        module.get_submodule("model.norm").register_forward_hook(self._take_hidden)
        module.get_submodule("lm_head").register_forward_hook(self._take_logits)

    def expect(self, parts: Sequence[ReadoutRows]) -> None:
        """Says what the next step is to be read for."""
        self._parts = parts

    def _take_hidden(self, _norm: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if not self._parts:
            return
        self._hidden_TH = output.flatten(0, -2)
        for part in self._parts:
            rows = slice(part.start, part.start + part.num_tokens)
            part.readout.take_hidden(part.first, self._hidden_TH[rows])

    def _take_logits(self, head: nn.Module, _args: Any, _output: torch.Tensor) -> None:
        # `forward` is called on the layer itself: calling the layer would come back here.
        hidden_TH, self._hidden_TH = self._hidden_TH, None
        for part in self._parts:
            assert hidden_TH is not None, "the norm comes before the output layer"
            positions = part.readout.positions(part.first, part.num_tokens)
            for begin in range(0, len(positions), self._rows_at_once):
                some = positions[begin : begin + self._rows_at_once]
                row = part.start + some.start - part.first
                logits_RV = head.forward(hidden_TH[row : row + len(some)]).float().cpu().numpy()
                for position, logits_V in zip(some, logits_RV, strict=True):
                    part.readout.take_logits(position, logits_V)
