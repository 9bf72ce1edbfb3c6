"""Results of metrics: statistics per group of rows, from which values and confidence intervals are computed.

Rows that share an image or a document are not independent, so statistics are kept per group, and groups are resampled.
Most metrics are ratios of two sums, or functions of sums (F1, corpus BLEU): `GroupedSums`. Other metrics (average
precision) implement `ResampleableMetric` themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
CombineSums = Callable[[Array], dict[str, Array]]


class ResampleableMetric(Protocol):
    """Groups of rows, and metrics as functions of the groups' weights."""

    @property
    def groups(self) -> Sequence[Hashable]:
        """The groups' names, shape (G,)."""

    def values(self, weights: Array) -> dict[str, Array]:
        """The metrics when every group counts `weights` times.

        Args:
            weights: shape (R, G); all ones for the plain value.

        Returns:
            Metric name → shape (R,); NaN where a metric is undefined (no row of this kind).
        """


class GroupedSums:
    """Sums of row statistics per group."""

    def __init__(self, row_groups: Sequence[Hashable], scale: float = 1.0) -> None:
        """
        Args:
            row_groups: the image or document of every row, shape (n,).
            scale: 100 for metrics that the official program prints as percent. It is also the largest value of a
                metric, unless `limits` names another one.
        """
        index: dict[Hashable, int] = {}
        self._codes = np.fromiter((index.setdefault(group, len(index)) for group in row_groups), dtype=np.int64)
        self.groups: list[Hashable] = list(index)
        self.scale = scale
        self.limits: dict[str, float] = {}
        self.ratios: dict[str, tuple[int, int]] = {}
        self._derived: list[CombineSums] = []
        self._sizes: dict[str, float] = {}
        self._most_rows: dict[str, float] = {}
        self._columns: list[Array] = []
        self._stacked: Array | None = None

    def add_column(self, values: ArrayLike) -> int:
        """Add a statistic, one number per row, shape (n,).

        Returns:
            Its index in the last axis of the arguments of `add_derived` functions.
        """
        weights = np.asarray(values, dtype=np.float64)
        sums: Array = np.bincount(self._codes, weights, len(self.groups)).astype(np.float64)
        self._columns.append(sums)
        return len(self._columns) - 1

    def add_ratio(self, name: str, numerators: ArrayLike, denominators: ArrayLike | None = None) -> None:
        """Add a metric that is a ratio of two sums; without denominators the mean over rows."""
        ones = np.ones(len(self._codes)) if denominators is None else denominators
        self.ratios[name] = (self.add_column(numerators), self.add_column(ones))

    def add_derived(self, combine: CombineSums, row_weights: Mapping[str, ArrayLike] | None = None) -> None:
        """Add metrics that are a function of the column sums, shape (R, columns) → name → shape (R,).

        Args:
            row_weights: metric → how much each row weighs in it, shape (n,), if they are yes/no rows that do not weigh
                the same: in a mean over classes those of rare classes weigh most.
        """
        self._derived.append(combine)
        for name, weights in (row_weights or {}).items():
            by_group = np.bincount(self._codes, np.asarray(weights, dtype=np.float64), len(self.groups))
            self._sizes[name], self._most_rows[name] = effective_size(by_group), effective_size(weights)

    def size(self, name: str) -> float:
        """On how many groups a metric rests: on fewer than there are, if these do not weigh the same (Kish 1965)."""
        if name in self._sizes:
            return self._sizes[name]
        if name in self.ratios:
            return effective_size(self.per_group[:, self.ratios[name][1]])
        return effective_size(np.bincount(self._codes, minlength=len(self.groups)))

    def most_rows(self, name: str) -> float | None:
        """How many independent yes/no rows a metric can be worth at most; None for metrics that have no such limit."""
        return self._most_rows.get(name)

    @property
    def per_group(self) -> Array:
        """All statistics, shape (G, columns)."""
        if self._stacked is None or self._stacked.shape[1] < len(self._columns):
            self._stacked = np.stack(self._columns, axis=1)
        return self._stacked

    def values(self, weights: Array) -> dict[str, Array]:
        """See `ResampleableMetric.values`."""
        return self.combine(weights @ self.per_group)

    def combine(self, sums: Array) -> dict[str, Array]:
        """Sums of every column, shape (R, columns) → metric name → shape (R,)."""
        found = {name: self.scale * divide(sums[:, top], sums[:, under]) for name, (top, under) in self.ratios.items()}
        for combine in self._derived:
            found |= combine(sums)
        return found


def effective_size(weights: ArrayLike) -> float:
    """The number of equal weights whose mean varies as much as one with these weights; 0 without any (Kish 1965)."""
    own = np.asarray(weights, dtype=np.float64)
    return float(own.sum() ** 2 / (own**2).sum()) if own.any() else 0.0


def divide(numerators: Array, denominators: Array) -> Array:
    """Element-wise division; NaN for denominators of 0."""
    undefined = np.full(np.broadcast(numerators, denominators).shape, np.nan)
    return np.divide(numerators, denominators, out=undefined, where=np.asarray(denominators) != 0)


@dataclass(frozen=True)
class MetricResult:
    """The result of a metric on one set of rows.

    Whether higher is better is declared for each metric with its task, see `metrics` in core/registry.py.

    Attributes:
        rule: name and version of the rule, e.g. "vqa-accuracy/a013f00".
        headline: the main metric, shown in tables; a name in the sample's values.
        unit: "fraction" or "percent", as the official program prints it.
        sample: the metrics and their statistics, for resampling. A name with a colon (`answer type: number`) is part
            of a breakdown.
        rows: the score of every row, in the order of the references, where the rule defines one.
        n: number of rows.
        invalid: number of answers that could not be parsed; they count as wrong and are never dropped.
        tables: results that are not a single number (confusion matrix, curves), as JSON.
        notes: metric → why it was not computed.
        constants: metrics without interval, because they cannot be resampled.
        remarks: what a reader of the numbers must know.
        answers: generated texts as lines of predictions.jsonl (`prediction`, and `finish_reason` if known), to be
            counted by `answers.add_answer_counts`; empty for other answers, and where the caller has these lines.
    """

    rule: str
    headline: str
    unit: str
    sample: ResampleableMetric
    n: int
    rows: list[float] | None = None
    invalid: int = 0
    tables: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    answers: Sequence[Mapping[str, Any]] = ()

    def values(self) -> dict[str, float]:
        """Metric name → value."""
        found = self.sample.values(np.ones((1, len(self.sample.groups))))
        return {name: float(value[0]) for name, value in found.items()} | self.constants


# Breakdowns: the mean for every kind of row.


def add_breakdown(sums: GroupedSums, name: str, labels: Sequence[Collection[Any]], scores: Array) -> None:
    """Add the mean score of the rows of each label to a sample, as `name: label`, labels in order.

    Args:
        labels: the labels of every row, none, one or several, shape (n,).
        scores: shape (n,).
    """
    members: defaultdict[Any, list[int]] = defaultdict(list)
    for row, own in enumerate(labels):
        for label in set(own):
            members[label].append(row)
    for label in sorted(members):
        chosen = np.zeros(len(scores))
        chosen[members[label]] = 1
        sums.add_ratio(f"{name}: {label}", scores * chosen, chosen)
