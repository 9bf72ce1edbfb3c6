"""Classification by generated text: accuracy, precision, recall, F1, confusion matrix.

Answers that are not labels are counted as `invalid`: wrong for the reference's class, and never dropped. Averages over
classes are scikit-learn's with `labels` = the classes in the references, and zero_division=0: a class without
references has no recall and is left out; a class that was never predicted has precision 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics.base import Array, GroupedSums, MetricResult, divide

RULE = "classification/2"
INVALID = "(invalid)"

Codes = NDArray[np.int64]


def measure(
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    positive: str | None = None,
) -> MetricResult:
    """Score answers against references.

    Args:
        answers, references: one of each per row.
        labels: the closed set of classes.
        groups: the image of each row; default: every row is its own group.
        positive: the positive class of `precision`, `recall` and `F1`; other labels and invalid answers are negative.

    Returns:
        accuracy, macro and weighted F1, precision and recall, with `positive` also precision, recall and F1. Tables:
        labels; classes (label → precision, recall, f1, support); confusion (rows: reference; columns: answer, in the
        order of `columns`); with `positive` positive (label, tp, tn, fp, fn).

    Raises:
        ValueError: a reference or `positive` is not a label.
    """
    codes = {label: code for code, label in enumerate(labels)}
    if unknown := {*references, *([] if positive is None else [positive])} - set(codes):
        raise ValueError(f"not among the labels: {sorted(unknown)}")
    asked = np.array([codes[reference] for reference in references], dtype=np.int64)
    answered = np.array([codes.get(answer, len(codes)) for answer in answers], dtype=np.int64)
    sums = GroupedSums(range(len(asked)) if groups is None else groups)
    sums.add_ratio("accuracy", asked == answered)
    if positive is not None:
        _add_positive(sums, asked == codes[positive], answered == codes[positive])
    _add_averages(sums, asked, answered, len(codes))
    confusion = np.bincount(asked * (len(codes) + 1) + answered, minlength=len(codes) * (len(codes) + 1))
    tables = _tables(list(codes), confusion.reshape(len(codes), len(codes) + 1), positive)
    rows = (asked == answered).astype(float).tolist()
    invalid = int((answered == len(codes)).sum())
    return MetricResult(RULE, "accuracy", "fraction", sums, len(asked), rows, invalid, tables)


def _add_positive(sums: GroupedSums, asked: NDArray[np.bool_], answered: NDArray[np.bool_]) -> None:
    sums.add_ratio("precision", asked & answered, answered)
    sums.add_ratio("recall", asked & answered, asked)
    (hits, answers), (_, support) = sums.ratios["precision"], sums.ratios["recall"]

    def combine(sums: Array) -> dict[str, Array]:
        precision = np.where(sums[:, answers] > 0, divide(sums[:, hits], sums[:, answers]), 0.0)
        return {"precision": precision, "F1": divide(2 * sums[:, hits], sums[:, answers] + sums[:, support])}

    # Without any reference of that label, F1 is 0 by definition and says nothing.
    sums.add_derived(combine, {"precision": answered, "F1": (asked | answered) & asked.any()})


def _add_averages(sums: GroupedSums, asked: Codes, answered: Codes, classes: int) -> None:
    right = np.where(asked == answered, asked, -1)
    columns = [[sums.add_column(rows == code) for code in range(classes)] for rows in (right, answered, asked)]

    def combine(sums: Array) -> dict[str, Array]:
        hits, answers, support = (sums[:, own] for own in columns)
        occurs = (support > 0).astype(np.float64)
        found: dict[str, Array] = {}
        for name, scores in zip(("F1", "precision", "recall"), _class_scores(hits, answers, support), strict=True):
            found[f"macro {name}"] = divide((scores * occurs).sum(axis=1), occurs.sum(axis=1))
            found[f"weighted {name}"] = divide((scores * support).sum(axis=1), support.sum(axis=1))
        return found

    sums.add_derived(combine, _row_weights(asked, answered, classes))


def _row_weights(asked: Codes, answered: Codes, classes: int) -> dict[str, Array]:
    """How much the rows weigh in each average: in a mean over classes, those of a rare class weigh most."""
    support, answers = np.bincount(asked, minlength=classes), np.bincount(answered, minlength=classes + 1)
    recall = 1 / support[asked]
    counted = np.append(support > 0, False)[answered]
    precision = np.where(counted, 1 / np.maximum(1, answers[answered]), 0.0)
    classes_there, first = np.unique(asked, return_index=True)
    precision[first[answers[classes_there] == 0]] += 1  # never answered: its precision rests on no more than one row
    macro = {"macro F1": recall, "macro recall": recall, "macro precision": precision}
    return macro | {f"weighted {name}": np.ones(len(asked)) for name in ("F1", "precision", "recall")}


def _class_scores(hits: Array, answers: Array, support: Array) -> tuple[Array, Array, Array]:
    """F1, precision and recall; 0 for denominators of 0."""
    pairs = ((2 * hits, answers + support), (hits, answers), (hits, support))
    f1, precision, recall = (np.nan_to_num(divide(top, under)) for top, under in pairs)
    return f1, precision, recall


def _tables(labels: list[str], confusion: NDArray[np.int64], positive: str | None) -> dict[str, Any]:
    support = confusion.sum(axis=1)
    scores = _class_scores(confusion.diagonal().astype(float), confusion[:, :-1].sum(axis=0), support)
    classes = {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(count)}
        for label, f1, precision, recall, count in zip(labels, *scores, support, strict=True)
    }
    tables = {
        "labels": labels,
        "classes": classes,
        "columns": [*labels, INVALID],
        "confusion": confusion.tolist(),
    }
    if positive is not None:
        tables["positive"] = {"label": positive, **_quadrants(confusion, labels.index(positive))}
    return tables


def _quadrants(confusion: NDArray[np.int64], code: int) -> dict[str, int]:
    """True and false positives and negatives of one label against all other labels."""
    hits, asked, answered = int(confusion[code, code]), int(confusion[code].sum()), int(confusion[:, code].sum())
    return {
        "tp": hits,
        "tn": int(confusion.sum()) - asked - answered + hits,
        "fp": answered - hits,
        "fn": asked - hits,
    }
