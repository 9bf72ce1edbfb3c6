"""Quantiles of Student's t distribution."""

from __future__ import annotations

import functools
import math

_MANY = 1_000
_NORMAL = {0.95: 1.959963984540054}
"""Inside probability → quantile of the normal distribution, which t approaches for many degrees of freedom."""


def student_quantile(freedom: float, inside: float = 0.95) -> float:
    """Return t with P(|T| < t) = `inside` for `freedom` degrees of freedom, at least 1.

    Between whole numbers it is interpolated linearly in 1 / freedom.
    """
    below = int(freedom)
    first = _whole_quantile(below, inside)
    if freedom == below:
        return first
    share = (1 / below - 1 / freedom) / (1 / below - 1 / (below + 1))
    return first + share * (_whole_quantile(below + 1, inside) - first)


@functools.cache
def _whole_quantile(freedom: int, inside: float) -> float:
    """The quantile of a whole number.

    The probability is a finite series in the angle atan(t / √freedom) (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    ascends from 0 to 1; bisection finds the angle.
    """
    if freedom > _MANY and inside in _NORMAL:
        z = _NORMAL[inside]
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, freedom) < inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _student_probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan(angle))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for number in range(1 + odd, freedom, 2):
        series += term
        term *= cosine**2 * number / (number + 1)
    series *= math.sin(angle)
    return 2 / math.pi * (angle + series) if odd else series
