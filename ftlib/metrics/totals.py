"""What a metric leaves behind: its statistics per group of rows, from which it and its uncertainty are computed.

Rows that share an image or a document are not independent, so everything is kept per group and groups are what is
resampled. Most metrics are ratios of two sums, or functions of sums (F1, corpus BLEU): `Totals`. Metrics that are not
(average precision) implement `Sample` themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Combine = Callable[[Array], dict[str, Array]]


class Sample(Protocol):
    """Groups of rows, and the metrics over any weighting of them."""

    @property
    def groups(self) -> Sequence[Hashable]:
        """The groups' names, shape (G,)."""

    def values(self, weights: Array) -> dict[str, Array]:
        """The metrics when every group counts `weights` times.

        Args:
            weights: shape (R, G); all ones for the plain value.

        Returns:
            Metric name → shape (R,); NaN where a metric is undefined (no row of its kind).
        """


class Totals:
    """Sums of row statistics per group."""

    def __init__(self, row_groups: Sequence[Hashable], scale: float = 1.0) -> None:
        """
        Args:
            row_groups: the image or document of every row, shape (n,).
            scale: 100 for metrics that their official program prints as percent.
        """
        index: dict[Hashable, int] = {}
        self._codes = np.fromiter((index.setdefault(group, len(index)) for group in row_groups), dtype=np.int64)
        self.groups: list[Hashable] = list(index)
        self.scale = scale
        self.ratios: dict[str, tuple[int, int]] = {}
        self._derived: list[Combine] = []
        self._columns: list[Array] = []
        self._stacked: Array | None = None

    def column(self, values: ArrayLike) -> int:
        """Add a statistic, one number per row, shape (n,).

        Returns:
            Its index in the last axis of what `derive` functions are given.
        """
        weights = np.asarray(values, dtype=np.float64)
        sums: Array = np.bincount(self._codes, weights, len(self.groups)).astype(np.float64)
        self._columns.append(sums)
        return len(self._columns) - 1

    def ratio(self, name: str, numerators: ArrayLike, denominators: ArrayLike | None = None) -> None:
        """Add a metric that is a ratio of two sums; without denominators the mean over rows."""
        ones = np.ones(len(self._codes)) if denominators is None else denominators
        self.ratios[name] = (self.column(numerators), self.column(ones))

    def derive(self, combine: Combine) -> None:
        """Add metrics that are a function of the column sums, shape (R, columns) → name → shape (R,)."""
        self._derived.append(combine)

    @property
    def per_group(self) -> Array:
        """All statistics, shape (G, columns)."""
        if self._stacked is None or self._stacked.shape[1] < len(self._columns):
            self._stacked = np.stack(self._columns, axis=1)
        return self._stacked

    def values(self, weights: Array) -> dict[str, Array]:
        """See `Sample.values`."""
        return self.combine(weights @ self.per_group)

    def combine(self, sums: Array) -> dict[str, Array]:
        """Sums of every column, shape (R, columns) → metric name → shape (R,)."""
        found = {name: self.scale * divide(sums[:, top], sums[:, under]) for name, (top, under) in self.ratios.items()}
        for combine in self._derived:
            found |= combine(sums)
        return found


def divide(numerators: Array, denominators: Array) -> Array:
    """Element-wise division; NaN where there is nothing to divide by."""
    undefined = np.full(np.broadcast(numerators, denominators).shape, np.nan)
    return np.divide(numerators, denominators, out=undefined, where=np.asarray(denominators) != 0)


@dataclass(frozen=True)
class Measured:
    """A metric's findings on one set of rows.

    Attributes:
        rule: name and version of the rule, e.g. "vqa-accuracy/a013f00".
        headline: the metric that stands for all others in tables; a name in the sample's values.
        unit: "fraction" or "percent", as the official program prints.
        sample: the metrics and what they can be resampled from. A name with a colon (`answer type: number`) belongs
            to a breakdown.
        rows: every row's own score, in the order of the references, where the rule defines one.
        n: number of rows.
        invalid: answers that could not be read as an answer; they count as wrong and are never dropped.
        tables: what is not a single number (confusion matrix, curves), as JSON.
        notes: metric → why it was not computed.
        constants: metrics that cannot be resampled and so have no interval.
    """

    rule: str
    headline: str
    unit: str
    sample: Sample
    n: int
    rows: list[float] | None = None
    invalid: int = 0
    tables: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Metric name → value."""
        found = self.sample.values(np.ones((1, len(self.sample.groups))))
        return {name: float(value[0]) for name, value in found.items()} | self.constants
