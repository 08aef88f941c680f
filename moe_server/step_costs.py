"""The least that steps have taken here, by how many tokens they had.

Decides with `deadlines` what cannot be done in time, so it errs to one side: no step is expected to
take longer than the fastest one that was not smaller. Knows no requests; the engine tells it.
"""

import math

_ENOUGH = 8
"""Steps before it says anything: the first ones of a process also pay for what is set up once."""


class StepCosts:
    """The fastest steps since the start, in classes of token counts that end at powers of two."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._fastest: dict[int, float] = {}
        """Seconds; class k: more than 2^(k-1) and up to 2^k tokens."""
        self._least: dict[int, float] = {}
        """What `least_s` said of 2^k tokens since the fastest changed: it is asked for every
        waiting request, and steps that are the fastest so far become rare."""

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` was run to its end for all of its requests."""
        self._num_steps += 1
        size = (num_tokens - 1).bit_length()
        if self._num_steps == _ENOUGH or seconds < self._fastest.get(size, math.inf):
            self._fastest[size] = min(seconds, self._fastest.get(size, seconds))
            self._least.clear()

    def least_s(self, num_tokens: int) -> float:
        """What a step of `num_tokens` takes at least; 0 while nobody knows.

        More tokens never take less time. So the bound is the fastest of all steps but those of
        classes below the largest one that was seen and holds no steps with more tokens.
        """
        size = num_tokens.bit_length() - 1  # classes up to it have no steps with more tokens
        least = self._least.get(size)
        if least is None:
            least = self._least[size] = self._least_from(size)
        return least

    def least_prefill_s(self, num_tokens: int, max_batch_tokens: int) -> float:
        """What `num_tokens` of prompts take at least, in as few steps as they fit."""
        whole, rest = divmod(num_tokens, max_batch_tokens)
        return whole * self.least_s(max_batch_tokens) + (self.least_s(rest) if rest else 0.0)

    def _least_from(self, size: int) -> float:
        smaller = [seen for seen in self._fastest if seen <= size]
        if self._num_steps < _ENOUGH or not smaller:
            return 0.0
        return min(seconds for seen, seconds in self._fastest.items() if seen >= max(smaller))
