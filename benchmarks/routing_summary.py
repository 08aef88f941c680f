"""What the routing benchmark's samples say: differences with their uncertainty, table, JSON.

Differences are of arms that ran next to each other. Knows no kernels and runs nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NUM_LAYERS = 32
"""Figures are for all of a model's layers."""
PARTS = ("gate", "plan", "gather", "combine", "host wait")
"""Of a layer, beside the experts: the first two are R - O, the next two a part of O - D."""
RESOLVED_SHARE = 0.25
"""A difference counts as measured if its uncertainty is at most this share of it."""
_NORMAL_MAD, _MEDIAN_ERROR, _TWO_SIDED_95 = 1.4826, 1.2533, 1.96


@dataclass(frozen=True, slots=True)
class Difference:
    """A median difference of paired samples."""

    median: float
    half_width: float
    """Of the median's 95 % interval, from the median absolute deviation."""

    def __str__(self) -> str:
        return f"{self.median:.1f} ±{self.half_width:.1f}"

    @property
    def is_resolved(self) -> bool:
        return 0 < self.half_width <= RESOLVED_SHARE * self.median


def difference(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Left minus right, pair by pair."""
    pairs = [a - b for a, b in zip(left, right, strict=True)]
    middle = statistics.median(pairs)
    if len(pairs) < 2:
        return Difference(middle, float("inf"))
    deviation = statistics.median(abs(pair - middle) for pair in pairs) * _NORMAL_MAD
    return Difference(middle, _TWO_SIDED_95 * _MEDIAN_ERROR * deviation / len(pairs) ** 0.5)


@dataclass(frozen=True, slots=True)
class Routing:
    """Everything about one batch size, microseconds a token over 32 layers."""

    num_tokens: int
    arms: dict[str, float]
    """Medians of D, O, R and of naive torch."""
    full: Difference
    """R - O beside experts of Mixtral's size: the definition."""
    sparsity: Difference
    """O - D."""
    thin: Difference
    """R - O beside thin experts."""
    thin_naive: float
    """Naive torch beside them."""
    direct: float
    """The routing call itself, timed inside R: beside Mixtral's experts."""
    parts: dict[str, float]
    """By PARTS."""
    naive_parts: dict[str, float]
    """gate and plan of naive torch."""
    num_rounds: int

    @property
    def source(self) -> str:
        """Where `overhead` comes from: the definition, or what stands in for it."""
        if self.full.is_resolved:
            return "R - O"
        if self.thin.is_resolved:
            return "R - O beside thin experts, as R - O beside Mixtral's is below their noise"
        return "the routing call's own time inside R, as both R - O are below the noise"

    @property
    def overhead(self) -> float:
        """The routing overhead."""
        for found in (self.full, self.thin):
            if found.is_resolved:
                return found.median
        return self.direct

    @property
    def naive(self) -> float:
        """Naive torch under the conditions that `overhead` was measured in."""
        is_thin = self.thin.is_resolved and not self.full.is_resolved
        return self.thin_naive if is_thin else self.arms["naive"]

    @property
    def work(self) -> str:
        """What was done, as ratios are keyed."""
        return "prefill" if self.num_tokens > 64 else "decode"


def per_token(seconds: Sequence[float], num_tokens: int) -> list[float]:
    """Of one layer's run, to microseconds a token over 32 layers."""
    return [value * 1e6 * NUM_LAYERS / num_tokens for value in seconds]


def table(results: Sequence[Routing], bars: dict[int, float]) -> list[str]:
    """Rows for the terminal."""
    columns = (
        f"{'T':>5} {'D':>9} {'O':>9} {'R':>9} {'R - O':>16} {'routing call':>13}"
        f" {'naive torch':>12} | {'thin R - O':>15} {'naive torch':>12} | {'bar':>5}"
    )
    rows = ["us per token over 32 layers", columns]
    for one in results:
        bar = f"{bars[one.num_tokens]:.0f}" if one.num_tokens in bars else ""
        rows.append(
            f"{one.num_tokens:>5} {one.arms['D']:9.0f} {one.arms['O']:9.0f} {one.arms['R']:9.0f}"
            f" {one.full!s:>16} {one.direct:13.1f} {one.arms['naive']:12.1f}"
            f" | {one.thin!s:>15} {one.thin_naive:12.1f} | {bar:>5}"
        )
    rows += [
        f"T = {one.num_tokens}: {one.overhead:.1f} us, {one.overhead / one.naive:.2f} of"
        f" naive torch, is {one.source} ({one.num_rounds} rounds; O - D is {one.sparsity})"
        for one in results
    ]
    rows += ["", f"{'T':>5} " + " ".join(f"{part:>10}" for part in PARTS)]
    rows += [
        f"{one.num_tokens:>5} " + " ".join(f"{one.parts[part]:10.1f}" for part in PARTS)
        for one in results
    ]
    return rows


def as_json(results: Sequence[Routing]) -> dict[str, object]:
    """The `results` of the JSON line."""
    return {
        "routing_us_per_token": {str(one.num_tokens): round(one.overhead, 2) for one in results},
        "source": {str(one.num_tokens): one.source for one in results},
        "details": {
            str(one.num_tokens): {
                "arms": _rounded(one.arms),
                "r_minus_o": _interval(one.full),
                "o_minus_d": _interval(one.sparsity),
                "thin_r_minus_o": _interval(one.thin),
                "thin_naive": round(one.thin_naive, 2),
                "routing_call": round(one.direct, 2),
                "parts": _rounded(one.parts),
                "naive_parts": _rounded(one.naive_parts),
                "rounds": one.num_rounds,
            }
            for one in results
        },
    }


def ratios(results: Sequence[Routing], weight_format: str) -> dict[str, float]:
    """Ours over naive torch's, by work, format and load."""
    return {
        f"{one.work}/{weight_format}/t{one.num_tokens}": round(one.overhead / one.naive, 3)
        for one in results
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def _interval(found: Difference) -> dict[str, float]:
    return {"median": round(found.median, 2), "half_width_95": round(found.half_width, 2)}
