"""From likelihoods of a closed set of labels to answers, with a threshold for the label that must not be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlib.errors import UserError

Array = NDArray[np.float64]

NEVER_PREDICT = 2.0
"""A threshold above every probability."""


@dataclass(frozen=True)
class Threshold:
    """From which probability on the positive label is answered.

    Attributes:
        value: probability among all labels.
        split: the rows that it was chosen on.
        rule: what it was chosen for.
        precision, recall: on those rows.
    """

    value: float
    split: str
    rule: str
    precision: float
    recall: float

    def describe(self, split: str) -> str:
        """What is said beside the scores of a split."""
        own = ", these very rows" if split == self.split else ""
        value = "" if self.value == NEVER_PREDICT else f"{self.value:.4f}, "
        return f"threshold of the positive label: {value}{self.rule} (on {self.split}{own})"

    def to_json(self) -> dict[str, Any]:
        """For scores.json."""
        return asdict(self)


def probabilities(likelihoods: Sequence[Sequence[float]]) -> Array:
    """Log-likelihoods, shape (rows, labels) → probabilities among the labels."""
    numbers = np.asarray(likelihoods, dtype=np.float64)
    shares = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    normal: Array = shares / shares.sum(axis=1, keepdims=True)
    return normal


def argmax_labels(shares: Array, labels: Sequence[str], positive: str | None, threshold: Threshold | None) -> list[str]:
    """The likeliest label of each row; with a threshold, the positive one where its probability reaches it."""
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
    """The precision/recall curve: one point for each distinct score, taken as threshold, from the highest down.

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
    """The threshold with the best F1, or the best recall among those of at least `min_precision`.

    It lies halfway to the next lower score, so that new rows of about the same score count. If none reaches the
    precision (an untrained model's may not), the positive label is never answered, and the rule says so.

    Raises:
        UserError: no row with the positive label.
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
        rule = f"never answered: no threshold reaches precision {min_precision}, the best is {precisions.max():.4f}"
        return Threshold(NEVER_PREDICT, split, rule, 0.0, 0.0)
    below = thresholds[index + 1] if index + 1 < len(thresholds) else 0.0
    value = float((thresholds[index] + below) / 2)
    return Threshold(value, split, rule, float(precisions[index]), float(recalls[index]))


def _f1(precisions: Array, recalls: Array) -> Array:
    sums = precisions + recalls
    return np.divide(2 * precisions * recalls, sums, out=np.zeros_like(sums), where=sums > 0)
