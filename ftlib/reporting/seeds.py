"""Values of several seeds: mean, standard deviation, and Student's interval of the mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n − 1; None for one value) of `n` runs.

    Attributes:
        interval: 95 % interval of the mean by Student's t, as if the runs were drawn independently; None for one value.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


def spread_of(values: Sequence[float]) -> Spread:
    """Sum up at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(len(values), mean, None, None)
    sd = statistics.stdev(values)
    reach = student_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return Spread(len(values), mean, sd, (mean - reach, mean + reach))


def student_quantile(freedom: int, inside: float = 0.95) -> float:
    """The t with P(|T| < t) = `inside` for so many degrees of freedom.

    The probability is a finite series in the angle atan(t / √freedom) (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    ascends from 0 to 1; bisection finds the angle.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan(angle))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for number in range(1 + odd, freedom, 2):
        series += term
        term *= cosine**2 * number / (number + 1)
    series *= math.sin(angle)
    return 2 / math.pi * (angle + series) if odd else series
