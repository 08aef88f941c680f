"""Numbers of the command line that must be finite: click takes "nan" for a number in any range."""

import math
from typing import Any

import click

DAY_S = 86_400.0


class FiniteRange(click.FloatRange):
    """A FloatRange without "nan" and "inf"."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Also refuses what compares as neither below nor above a bound."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


SECONDS = FiniteRange(min=0, max=DAY_S)
POSITIVE_SECONDS = FiniteRange(min=0, max=DAY_S, min_open=True)
POSITIVE = FiniteRange(min=0, min_open=True)
