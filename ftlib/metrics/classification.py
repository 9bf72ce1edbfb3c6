"""Classification by generated text: accuracy, per-class precision, recall and F1, confusion matrix.

Answers that are no label are counted as `invalid`: wrong for the class asked, and never dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

RULE = "classification/1"
INVALID = "(invalid)"


def summarize(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Score answers against references.

    Args:
        answers, references: one of each per row.
        labels: the closed set of classes.

    Returns:
        rule, accuracy, invalid (number of answers outside `labels`), macro_f1, classes (label → precision, recall, f1,
        support; a precision without any such answer is 0, as in scikit-learn's zero_division=0) and confusion (rows:
        reference; columns: answer, in the order of `columns`).
    """
    known = set(labels)
    pairs = Counter(
        (reference, answer if answer in known else INVALID)
        for answer, reference in zip(answers, references, strict=True)
    )
    columns = [*labels, INVALID]
    classes = {label: _class_scores(label, pairs) for label in labels}
    supported = [scores["f1"] for scores in classes.values() if scores["support"]]
    return {
        "rule": RULE,
        "accuracy": sum(pairs[label, label] for label in labels) / len(references),
        "invalid": sum(count for (_, answer), count in pairs.items() if answer == INVALID),
        "macro_f1": sum(supported) / len(supported),
        "classes": classes,
        "columns": columns,
        "confusion": [[pairs[label, column] for column in columns] for label in labels],
    }


def _class_scores(label: str, pairs: Counter[tuple[str, str]]) -> dict[str, float]:
    hits = pairs[label, label]
    answered = sum(count for (_, answer), count in pairs.items() if answer == label)
    support = sum(count for (reference, _), count in pairs.items() if reference == label)
    precision = hits / answered if answered else 0.0
    recall = hits / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}
