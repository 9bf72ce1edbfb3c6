"""Likely wrong labels: confident learning (Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in
Dataset Labels, JAIR 2021).

Every row needs the probabilities of a model that was not trained on it. A row counts as certain of a class if its
probability reaches the mean probability of that class among the rows with that label; the table of given label and
certain class, scaled to the number of rows of each label, estimates how many labels are wrong. As many rows are
reported, those whose given label is least probable, if another class is more probable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics.base import Array

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class LabelIssues:
    """Likely wrong labels.

    Attributes:
        rows: indices of the rows, the least probable label first.
        suggested: the most probable class of every row, shape (n,).
        joint: estimated number of rows by given label (rows) and true class (columns), shape (classes, classes).
    """

    rows: Indices
    suggested: Indices
    joint: Array


def find_label_issues(probabilities: Array, given: Indices) -> LabelIssues:
    """Find likely wrong labels.

    Args:
        probabilities: of every class, by a model that has not seen the row in training, shape (n, classes).
        given: the class of each row's label, shape (n,).
    """
    rows, classes = probabilities.shape
    counts = np.bincount(given, minlength=classes)
    own = probabilities[np.arange(rows), given]
    sums = np.bincount(given, own, classes)
    thresholds = np.divide(sums, counts, out=np.full(classes, np.inf), where=counts > 0)
    certain = np.where(probabilities >= thresholds, probabilities, -1.0)
    known = certain.max(axis=1) >= 0
    pairs = given[known] * classes + certain[known].argmax(axis=1)
    joint = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.float64)
    totals = joint.sum(axis=1)
    joint[totals == 0] += np.diag(counts.astype(np.float64))[totals == 0]  # nothing speaks against these labels
    joint *= (counts / np.maximum(joint.sum(axis=1), 1))[:, None]
    wrong = round(float(joint.sum() - np.trace(joint)))
    suggested: Indices = probabilities.argmax(axis=1)
    order = np.argsort(own, kind="stable")
    return LabelIssues(order[(suggested != given)[order]][:wrong], suggested, joint)
