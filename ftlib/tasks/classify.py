"""Classification: each reference is one label; the labels are those that occur in the references.

Its metrics are computed in metrics/classification.py; their directions are declared in core/registry.py (`TASKS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftlib.core.registry import register_task
from ftlib.data.example import raise_all
from ftlib.data.sources.records import format_ids, read_text_predictions, read_text_references, shown_id, single_file
from ftlib.errors import UserError
from ftlib.metrics import classification
from ftlib.metrics.base import MetricResult
from ftlib.tasks.base import PredictionRecord, Task, expected_of


def score(references: Sequence[Path], predictions: Path, positive: str | None = None) -> MetricResult:
    """Accuracy, precision, recall and F1 of generated labels.

    Args:
        references: one JSONL file.
        positive: the positive class for precision and recall.

        Raises:
            UserError: malformed files, different ids in both, rows with several labels, `positive` is not a label.
    """
    path = single_file(references, "classify")
    rows = read_text_references(path)
    several = [
        f"{path}: id {shown_id(row.id)}: {len(row.expected)} labels instead of one" for row in rows if row.expected[1:]
    ]
    raise_all(several, "Rows with several accepted texts are scored by `ftlib score text`.")
    asked = [row.expected[0] for row in rows]
    labels = sorted(set(asked))
    if positive is not None and positive not in labels:
        raise UserError(f"--positive {positive}: no such label in {path}", f"Labels: {format_ids(labels)}")
    answers = read_text_predictions(predictions, rows)
    return classification.measure(answers, asked, labels, [row.group for row in rows], positive)


def _classification(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    return classification.measure(
        [record["prediction"] for record in records],
        [expected_of(record) for record in records],
        labels,
        [record["image"] or record["id"] for record in records],
        positive,
    )


@register_task(name="classify")
def make_task() -> Task:
    return Task(
        score=_classification,
    )
