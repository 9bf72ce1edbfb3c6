"""Confidence intervals of metrics, and paired tests of two systems.

An interval has the form of Wilson's interval of a share (1927), for any metric between 0 and its largest value: the
number of rows is replaced by the number of yes/no rows that would vary as much (Korn and Graubard 1998), and the
normal quantile by Student's. How much a metric varies is measured by the jackknife (Efron and Stein 1981): images or
documents, not rows, are left out one after the other and the whole metric is computed again, so corpus metrics are
never averaged. Such an interval always contains its value, stays within the metric's range, and has a width also where
all rows are right. It is one of the score that the model is expected to get on other test sets of this size and kind.
A share of single yes/no rows has Wilson's own interval.

Two corrections are for few or unlike groups. Where a few of them determine the jackknife's variance (a huge
mask, a long text), Student's quantile has fewer degrees of freedom, from the variance of that variance
(Satterthwaite 1946; for the jackknife Hinkley 1977). And the variance is a mean with one more group, as different as a
yes/no row (a prior with the information of one observation, Kass and Wasserman 1995): ten like scores do not show that
the next one cannot be 0.

Two systems on the same rows are compared by approximate randomization (Noreen 1989): under the null hypothesis the
answers of a group can be exchanged between the systems. With up to 10 groups all 2^10 exchanges are tried, with more
groups they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics.base import Array, GroupedSums, MetricResult, ResampleableMetric
from ftlib.metrics.student import student_quantile

RESAMPLES = 2_000
LEVEL = 0.95
FEW_GROUPS = 30
MAX_BLOCKS = 1_000
"""With more groups, this many random blocks of groups are left out instead of single groups."""

_Z = 1.959963984540054
_BLOCK = 1 << 22
_EXACT_GROUPS = 10
_ROUNDING = 1e-6
_LEAST_SIZE = 1.5
"""An interval needs two groups: one tells nothing about how much they vary."""

Interval = tuple[float, float]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PairedTest:
    """A difference B − A on the same rows.

    Attributes:
        interval: 95 % interval of the difference, by the jackknife over groups; None for a single group.
        p: two-sided probability of a difference at least this large if there is none.
        groups: number of images or documents.
    """

    difference: float
    interval: Interval | None
    p: float
    groups: int

    @property
    def verdict(self) -> str:
        """The result in words, for tables."""
        if self.p < 1 - LEVEL:
            return "real"
        return "noise" if self.groups >= FEW_GROUPS else f"noise (only {self.groups} independent rows)"


def confidence_intervals(result: MetricResult) -> dict[str, Interval | None]:
    """95 % interval of every metric; None where it is undefined, or rests on a single image or document.

    Returns:
        Metric name → (lower, upper).
    """
    sample = result.sample
    left_out = _left_out(sample)
    values = {name: float(found[0]) for name, found in sample.values(np.ones((1, len(sample.groups)))).items()}
    found = {name: _interval(sample, name, value, left_out[name]) for name, value in values.items()}
    return found | _wilson_intervals(sample)


def paired_test(a: ResampleableMetric, b: ResampleableMetric, metric: str, seed: int = 0) -> PairedTest:
    """Whether system B differs from system A in a metric, on the same rows.

    Raises:
        ValueError: the groups differ.
    """
    if list(a.groups) != list(b.groups):
        raise ValueError("the two systems were not asked the same rows")
    ones = np.ones((1, len(a.groups)))
    observed = float(b.values(ones)[metric][0] - a.values(ones)[metric][0])
    differences = _left_out(b)[metric] - _left_out(a)[metric]
    interval = _difference_interval(a, metric, observed, differences)
    return PairedTest(observed, interval, _p_value(a, b, metric, observed, seed), len(a.groups))


# The jackknife.


def _left_out(sample: ResampleableMetric) -> dict[str, Array]:
    """Every metric without each of the groups, or without each of `MAX_BLOCKS` random blocks of them."""
    groups = len(sample.groups)
    blocks = min(groups, MAX_BLOCKS)
    owner = np.random.default_rng(0).permutation(groups) % blocks if groups > blocks else np.arange(groups)
    if isinstance(sample, GroupedSums):
        return _left_out_sums(sample, owner, blocks)
    found = []
    for chosen in _chunks(blocks, groups):
        found.append(sample.values((owner[None, :] != chosen[:, None]).astype(np.float64)))
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _left_out_sums(sample: GroupedSums, owner: Indices, blocks: int) -> dict[str, Array]:
    sums = sample.per_group[np.argsort(owner, kind="stable")]
    sums = np.add.reduceat(sums, np.searchsorted(np.sort(owner), np.arange(blocks)), axis=0)
    total = sums.sum(axis=0)
    found = []
    for chosen in _chunks(blocks, sums.shape[1]):
        rest = total - sums[chosen]
        rest[np.abs(rest) < 1e-12 * np.abs(total)] = 0  # what rounding leaves of 0
        found.append(sample.combine(rest))
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _chunks(count: int, width: int) -> Iterator[Indices]:
    """The numbers up to `count`, in chunks of which a table with `width` columns is not too large."""
    size = max(1, _BLOCK // max(1, width))
    for start in range(0, count, size):
        yield np.arange(start, min(count, start + size))


def _standard_error(left_out: Array) -> float:
    """The jackknife's; blocks without which the metric is undefined are ignored."""
    known = left_out[~np.isnan(left_out)]
    if len(known) < 2:
        return float("nan")
    return float(np.sqrt((len(known) - 1) / len(known) * ((known - known.mean()) ** 2).sum()))


# Intervals.


def _interval(sample: ResampleableMetric, name: str, value: float, left_out: Array) -> Interval | None:
    size, error = _size(sample, name), _standard_error(left_out)
    if np.isnan(value) or np.isnan(error) or size < _LEAST_SIZE:
        return None
    most = sample.most_rows(name) if isinstance(sample, GroupedSums) else None
    known = len(left_out) if most is not None and most == size else round(size)
    limit = _limit(sample, name, np.append(left_out, value))
    if limit is None:
        quantile = student_quantile(_freedom(left_out, known - 1))
        return value - quantile * error, value + quantile * error
    share, variance = min(1.0, max(0.0, value / limit)), (error / limit) ** 2
    # Where `most` bounds what the rows are worth, it accounts for the few that decide.
    quantile = student_quantile(max(1, known - 1) if most else _freedom(left_out / limit, known - 1, share))
    binary = share * (1 - share) / size
    variance = max(variance, ((known - 1) * variance + binary) / known)
    n = binary * size / variance if variance > 0 and binary > 0 else size
    n = n if most is None else min(n, most)
    low, high = wilson(share * n, n, quantile)
    return limit * low, limit * high


def _freedom(left_out: Array, most: int, share: float | None = None) -> float:
    """The degrees of freedom of the jackknife's variance V: 2 V² / the variance of V, found by the jackknife too.

    Args:
        most: those of as many alike, normally distributed groups.
        share: the metric as a share of its limit, if the interval is Wilson's, in which V is a multiple of
            share · (1 − share): then it is the variance of that multiple, which is none for yes/no rows.
    """
    most = max(1, most)
    known = left_out[~np.isnan(left_out)]
    influence = (len(known) - 1) * (known.mean() - known)
    variance = (influence**2).mean()
    if variance <= _ROUNDING**2:
        return most
    change = influence**2 / variance - 1
    if share is not None and 0 < share < 1:
        change -= (1 - 2 * share) / (share * (1 - share)) * influence
    excess = max(0.0, (change**2).mean() - 2) / len(known)
    return float(max(1.0, 2 / (2 / most + excess)))


def _size(sample: ResampleableMetric, name: str) -> float:
    """On how many independent groups a metric rests."""
    return sample.size(name) if isinstance(sample, GroupedSums) else float(len(sample.groups))


def _limit(sample: ResampleableMetric, name: str, values: Array) -> float | None:
    """The largest possible value of a metric; None if its values are not between 0 and a limit."""
    limit = 1.0
    if isinstance(sample, GroupedSums):
        limit = sample.limits.get(name, sample.scale)
        if name in sample.ratios:
            top, under = (sample.per_group[:, column] for column in sample.ratios[name])
            if (top < -_ROUNDING).any() or (sample.scale * top > limit * under + _ROUNDING).any():
                return None
    known = values[~np.isnan(values)]
    return limit if ((known > -_ROUNDING) & (known < limit + _ROUNDING)).all() else None


def _difference_interval(sample: ResampleableMetric, name: str, observed: float, left_out: Array) -> Interval | None:
    """Student's interval of a difference; where all groups differ alike, as wide as for one group that does not."""
    size, error = _size(sample, name), _standard_error(left_out)
    if np.isnan(observed) or np.isnan(error) or size < _LEAST_SIZE:
        return None
    quantile = student_quantile(_freedom(left_out, round(size) - 1))
    limit = _limit(sample, name, np.array([]))
    if limit is None:
        return observed - quantile * error, observed + quantile * error
    margin = quantile * error or limit * quantile**2 / (size + quantile**2)
    return max(-limit, observed - margin), min(limit, observed + margin)


def _wilson_intervals(sample: ResampleableMetric) -> dict[str, Interval | None]:
    """Intervals of the ratios that count one yes/no row per group."""
    if not isinstance(sample, GroupedSums):
        return {}
    sums = sample.per_group
    found: dict[str, Interval | None] = {}
    for name, (top, under) in sample.ratios.items():
        hits, rows = sums[:, top], sums[:, under]
        if np.isin(hits, (0, 1)).all() and np.isin(rows, (0, 1)).all() and (hits <= rows).all() and rows.sum() > 1:
            low, high = wilson(hits.sum(), rows.sum())
            found[name] = (sample.scale * low, sample.scale * high)
    return found


def wilson(hits: float, n: float, quantile: float = _Z) -> Interval:
    """Wilson's score interval of a share, 95 %, modified for few hits or few misses (Brown, Cai and DasGupta 2001).

    Args:
        hits, n: numbers of rows, not necessarily whole ones.
        quantile: of the normal distribution, or of Student's where the variance is estimated.
    """
    share = hits / n
    center = share + quantile**2 / (2 * n)
    margin = quantile * np.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2))
    low, high = (center - margin) / (1 + quantile**2 / n), (center + margin) / (1 + quantile**2 / n)
    return max(0.0, min(low, _poisson_limit(hits, n))), min(1.0, max(high, 1 - _poisson_limit(n - hits, n)))


_POISSON = (0.0, 0.051293, 0.355362, 0.817691)
"""The mean of a Poisson distribution that reaches 0, 1, 2, 3 or more in 5 % of cases."""


def _poisson_limit(hits: float, n: float) -> float:
    """The lower limit of a share of few hits; 1 for more."""
    if hits < 1e-9:
        return 0.0
    most = 3 if n > 50 else 2
    return float(np.interp(hits, range(most + 1), _POISSON[: most + 1])) / n if hits <= most else 1.0


# The paired test.


def _p_value(a: ResampleableMetric, b: ResampleableMetric, metric: str, observed: float, seed: int) -> float:
    if np.isnan(observed):
        return float("nan")
    if not (isinstance(a, GroupedSums) and isinstance(b, GroupedSums)):
        weights = list(_weights(len(a.groups), seed))
        differences = np.concatenate([b.values(one)[metric] - a.values(one)[metric] for one in weights])
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


def _weights(count: int, seed: int) -> Iterator[Array]:
    """Blocks of shape (resamples, groups): how often each group was drawn."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        picks = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
