"""Confidence intervals of metrics, and paired tests of two systems.

Intervals are percentile bootstrap intervals (Efron 1979) over groups of rows (images, documents): a resample counts
every group 0, 1, 2 … times and recomputes the whole metric, so corpus metrics are never averaged. A share of yes/no
rows, one per group, has Wilson's interval (1927) instead, which is also valid for few rows and for 0 % and 100 %, where
a bootstrap interval has no width.

Two systems on the same rows are compared by approximate randomization (Noreen 1989): under the null hypothesis the
answers of a group can be exchanged between the systems. With up to 10 groups all 2^10 exchanges are tried, with more
groups they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ftlib.metrics.base import Array, GroupedSums, MetricResult, ResampleableMetric

RESAMPLES = 2_000
LEVEL = 0.95
FEW_GROUPS = 30
_Z = 1.959963984540054
_BLOCK = 1 << 22
_EXACT_GROUPS = 10

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedTest:
    """A difference B − A on the same rows.

    Attributes:
        interval: 95 % percentile bootstrap interval of the difference, groups resampled together.
        p: two-sided probability of a difference at least this large if there is none.
        groups: number of images or documents.
    """

    difference: float
    interval: Interval
    p: float
    groups: int

    @property
    def verdict(self) -> str:
        """The result in words, for tables."""
        if self.p < 1 - LEVEL:
            return "real"
        return "noise" if self.groups >= FEW_GROUPS else f"noise (only {self.groups} independent rows)"


def confidence_intervals(result: MetricResult, seed: int = 0) -> dict[str, Interval | None]:
    """95 % interval of every metric; None where it is undefined.

    Returns:
        Metric name → (lower, upper).
    """
    drawn = _resampled(result.sample, seed)
    found = {name: _quantiles(values) for name, values in drawn.items()}
    return found | _wilson_intervals(result.sample)


def paired_test(a: ResampleableMetric, b: ResampleableMetric, metric: str, seed: int = 0) -> PairedTest:
    """Whether system B differs from system A in a metric, on the same rows.

    Raises:
        ValueError: the groups differ.
    """
    if list(a.groups) != list(b.groups):
        raise ValueError("the two systems were not asked the same rows")
    differences = np.concatenate(
        [b.values(weights)[metric] - a.values(weights)[metric] for weights in _weights(len(a.groups), seed)]
    )
    ones = np.ones((1, len(a.groups)))
    observed = float(b.values(ones)[metric][0] - a.values(ones)[metric][0])
    interval = _quantiles(differences) or (np.nan, np.nan)
    return PairedTest(observed, interval, _p_value(a, b, metric, observed, differences, seed), len(a.groups))


def _weights(count: int, seed: int) -> Iterator[Array]:
    """Blocks of shape (resamples, groups): how often each group was drawn."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        picks = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _resampled(sample: ResampleableMetric, seed: int) -> dict[str, Array]:
    blocks = [sample.values(weights) for weights in _weights(len(sample.groups), seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _quantiles(values: Array) -> Interval | None:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _wilson_intervals(sample: ResampleableMetric) -> dict[str, Interval | None]:
    """Intervals of the ratios that count one yes/no row per group."""
    if not isinstance(sample, GroupedSums):
        return {}
    sums = sample.per_group
    found: dict[str, Interval | None] = {}
    for name, (top, under) in sample.ratios.items():
        hits, rows = sums[:, top], sums[:, under]
        if np.isin(hits, (0, 1)).all() and np.isin(rows, (0, 1)).all() and (hits <= rows).all() and rows.any():
            low, high = wilson(hits.sum(), rows.sum())
            found[name] = (sample.scale * low, sample.scale * high)
    return found


def wilson(hits: float, n: float) -> Interval:
    """Wilson's score interval of a share, 95 %."""
    share = hits / n
    center = share + _Z**2 / (2 * n)
    margin = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = (center - margin) / (1 + _Z**2 / n), (center + margin) / (1 + _Z**2 / n)
    return float(max(0.0, low)) if hits else 0.0, float(min(1.0, high)) if hits < n else 1.0


def _p_value(
    a: ResampleableMetric, b: ResampleableMetric, metric: str, observed: float, differences: Array, seed: int
) -> float:
    if np.isnan(observed):
        return float("nan")
    if not (isinstance(a, GroupedSums) and isinstance(b, GroupedSums)):
        below, above = (differences <= 0).mean(), (differences >= 0).mean()
        return float(min(1.0, 2 * min(below, above)))
    left, change = a.per_group, b.per_group - a.per_group
    size = largest = 0
    for exchanged in _exchanges(len(left), seed):
        moved = exchanged @ change
        swapped_a, swapped_b = left.sum(axis=0) + moved, (left + change).sum(axis=0) - moved
        gaps = np.abs(b.combine(swapped_b)[metric] - a.combine(swapped_a)[metric])
        largest += int((gaps >= abs(observed) * (1 - 1e-12)).sum())
        size += len(gaps)
    exact = len(left) <= _EXACT_GROUPS
    return largest / size if exact else (largest + 1) / (size + 1)


def _exchanges(count: int, seed: int) -> Iterator[Array]:
    """Blocks of shape (trials, groups): 1 where a group's answers are exchanged."""
    if count <= _EXACT_GROUPS:
        yield ((np.arange(1 << count)[:, None] >> np.arange(count)) & 1).astype(np.float64)
        return
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        yield generator.integers(0, 2, size=(min(block, RESAMPLES - start), count)).astype(np.float64)
