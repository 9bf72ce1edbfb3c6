"""Labels from likelihoods, with a probability threshold for the positive class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlib.errors import UserError

Array = NDArray[np.float64]

NEVER_PREDICT = 2.0
"""A threshold above all probabilities: the positive label is never predicted."""


@dataclass(frozen=True)
class Threshold:
    """The probability from which on the positive label is predicted.

    Attributes:
        value: probability among all labels.
        split: the split that it was chosen on.
        rule: the criterion of the choice.
        precision, recall: on that split.
    """

    value: float
    split: str
    rule: str
    precision: float
    recall: float

    def describe(self, split: str) -> str:
        """Return the description for the scores of a split."""
        own = ", the same rows" if split == self.split else ""
        value = "" if self.value == NEVER_PREDICT else f"{self.value:.4f}, "
        return f"threshold of the positive label: {value}{self.rule} (on {self.split}{own})"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of scores.json."""
        return asdict(self)


def probabilities(likelihoods: Sequence[Sequence[float]]) -> Array:
    """Convert log-likelihoods, shape (rows, labels), to probabilities among the labels."""
    numbers = np.asarray(likelihoods, dtype=np.float64)
    shares = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    normal: Array = shares / shares.sum(axis=1, keepdims=True)
    return normal


def argmax_labels(shares: Array, labels: Sequence[str], positive: str | None, threshold: Threshold | None) -> list[str]:
    """Return the most likely label of each row; with a threshold, the positive label if its probability reaches it."""
    if threshold is None or positive is None:
        return [labels[index] for index in shares.argmax(axis=1)]
    column = list(labels).index(positive)
    others = shares.copy()
    others[:, column] = -1.0
    best = [labels[index] for index in others.argmax(axis=1)]
    return [
        positive if share >= threshold.value else other for share, other in zip(shares[:, column], best, strict=True)
    ]


def precision_recall(scores: Array, truth: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Return the precision/recall curve: one point for each distinct score as threshold, in descending order.

    Args:
        scores: probability of the positive label, shape (n,).
        truth: whether the positive label is right, shape (n,).

    Returns:
        thresholds, precisions, recalls. Without a true positive label recall is NaN.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    hits = np.cumsum(truth[order])[last].astype(np.float64)
    answered = np.flatnonzero(last) + 1.0
    total = float(truth.sum())
    return ranked[last], hits / answered, hits / total if total else np.full(len(hits), np.nan)


def choose_threshold(scores: Array, truth: NDArray[np.bool_], min_precision: float | None, split: str) -> Threshold:
    """Return the threshold with the best F1, or the best recall among those with at least `min_precision`.

    The threshold is halfway to the next lower score, so that new rows with about the same score count. If none reaches
    the precision (which is possible for a base model), the positive label is never predicted, and the rule says so.

    Raises:
        UserError: no row has the positive label.
    """
    if not truth.any():
        raise UserError(f"no threshold can be chosen: no row of {split} has the positive label")
    thresholds, precisions, recalls = precision_recall(scores, truth)
    if min_precision is None:
        rule, merit = "best F1", _f1(precisions, recalls)
    else:
        rule, merit = (
            f"best recall with precision >= {min_precision}",
            np.where(precisions >= min_precision, recalls, -1.0),
        )
    index = int(merit.argmax())
    if merit[index] < 0:
        rule = f"never predicted: no threshold reaches precision {min_precision}, the best is {precisions.max():.4f}"
        return Threshold(NEVER_PREDICT, split, rule, 0.0, 0.0)
    below = thresholds[index + 1] if index + 1 < len(thresholds) else 0.0
    value = float((thresholds[index] + below) / 2)
    return Threshold(value, split, rule, float(precisions[index]), float(recalls[index]))


def _f1(precisions: Array, recalls: Array) -> Array:
    sums = precisions + recalls
    return np.divide(2 * precisions * recalls, sums, out=np.zeros_like(sums), where=sums > 0)
