"""From one row of logits to log-probabilities, in numpy and in float64.

By itself, whatever rows stand beside it: `sampler` and `readout` report the same bits for it.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Scores: TypeAlias = npt.NDArray[np.float32]
Logprobs: TypeAlias = npt.NDArray[np.float64]


def log_softmax(row: Scores) -> Logprobs:
    """The model's own distribution, before anything that sampling changes."""
    logprobs: Logprobs = row.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    return logprobs
