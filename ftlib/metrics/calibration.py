"""Calibration: whether answers that are given with a confidence of 80 % are right in 80 % of cases.

Rows are put into bins by confidence. The expected calibration error (ECE) is the mean distance between accuracy and
mean confidence of the bins, weighted by their rows (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).
Bins have equal width (15, as in that paper) or, for the adaptive error, equal numbers of rows. An ECE is never
negative, so it is above 0 also for a calibrated model: `Calibration.expected` says how much.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics.base import Array, GroupedSums, MetricResult
from ftlib.metrics.uncertainty import Interval, confidence_intervals

BINS = 15
_DRAWS = 200
ECE, ADAPTIVE_ECE = "ECE", "adaptive ECE"


@dataclass(frozen=True)
class CalibrationBin:
    """The rows of one bin.

    Attributes:
        low, high: the bin's edges; low is not part of it, except for 0.
        confidence: mean.
        accuracy, interval: the share of right answers, with its 95 % interval.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float
    interval: Interval | None


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram and its errors.

    Attributes:
        bins: of equal width, without empty ones.
        errors: `ECE` and `ADAPTIVE_ECE` → value, 95 % interval.
        expected: mean and 95th percentile of the ECE of a perfectly calibrated model with these confidences.
        confidence, accuracy: means over all rows.
    """

    bins: list[CalibrationBin]
    errors: dict[str, tuple[float, Interval | None]]
    expected: tuple[float, float]
    n: int
    confidence: float
    accuracy: float


def calibration(
    confidences: Sequence[float], right: Sequence[bool], groups: Sequence[Hashable] | None = None, bins: int = BINS
) -> Calibration:
    """Compare confidences with what is right.

    Args:
        confidences: the probability of each answer, between 0 and 1, shape (n,), at least one.
        right: whether the answers are right, shape (n,).
        groups: the image of each row; default: every row is its own group.
        bins: number of bins.
    """
    shares, hits = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    sums = GroupedSums(range(len(shares)) if groups is None else groups)
    edges = np.linspace(0, 1, bins + 1)
    codes = _codes(shares, edges)
    _add_error(sums, ECE, hits - shares, codes)
    _add_error(sums, ADAPTIVE_ECE, hits - shares, _codes(shares, np.quantile(shares, edges)))
    occupied = np.unique(codes)
    for code in occupied:
        sums.add_ratio(f"bin {code}", hits * (codes == code), (codes == code).astype(np.float64))
    result = MetricResult("calibration/1", ECE, "fraction", sums, len(shares))
    values, intervals = result.values(), confidence_intervals(result)
    return Calibration(
        bins=[
            CalibrationBin(
                float(edges[code]),
                float(edges[code + 1]),
                int((codes == code).sum()),
                float(shares[codes == code].mean()),
                values[f"bin {code}"],
                intervals[f"bin {code}"],
            )
            for code in occupied
        ],
        errors={name: (values[name], intervals[name]) for name in (ECE, ADAPTIVE_ECE)},
        expected=_expected(shares, codes),
        n=len(shares),
        confidence=float(shares.mean()),
        accuracy=float(hits.mean()),
    )


def _codes(shares: Array, edges: Array) -> NDArray[np.int64]:
    """The bin of each row: its edge below does not belong to a bin, its edge above does."""
    codes: NDArray[np.int64] = np.clip(np.searchsorted(edges, shares, side="left") - 1, 0, len(edges) - 2)
    return codes


def _add_error(sums: GroupedSums, name: str, gaps: Array, codes: NDArray[np.int64]) -> None:
    """Add the weighted mean of the bins' |accuracy − confidence|, which is |sum of the rows' gaps| / n for each bin."""
    columns = [sums.add_column(gaps * (codes == code)) for code in np.unique(codes)]
    rows = sums.add_column(np.ones(len(gaps)))

    def combine(totals: Array) -> dict[str, Array]:
        return {name: np.abs(totals[:, columns]).sum(axis=1) / np.maximum(1, totals[:, rows])}

    sums.add_derived(combine)


def _expected(shares: Array, codes: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and 95th percentile of the ECE if every answer is right with the probability of its confidence."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        gaps = (draw.random(len(shares)) < shares) - shares
        found.append(np.abs(np.bincount(codes, gaps)).sum() / len(shares))
    return float(np.mean(found)), float(np.quantile(found, 0.95))
