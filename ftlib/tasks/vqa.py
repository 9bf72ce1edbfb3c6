"""Visual question answering: VQA accuracy over the answers of several annotators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ftlib.core.registry import register_task
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.metrics.vqa_accuracy import MIN_VQA_ANSWERS
from ftlib.tasks.base import (
    PredictionRecord,
    Task,
    facts_of,
    groups_of,
    have_fact,
    predictions_of,
    references_of,
    result_file,
)

if TYPE_CHECKING:
    from ftlib.metrics.base import MetricResult


def validate_vqa_target(row: Example) -> str:
    """Check that a row has the answers of several annotators, which VQA accuracy needs."""
    if len(row.references) >= MIN_VQA_ANSWERS:
        return ""
    return (
        f"field references: {len(row.references)} answers, but VQA accuracy needs {MIN_VQA_ANSWERS} or more, "
        "usually ten"
    )


def _vqa(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    from ftlib.metrics import vqa_accuracy

    for record in records:
        if len(record["references"]) < MIN_VQA_ANSWERS:
            problem = f"row {record['id']}: VQA accuracy needs the answers of several annotators, usually ten"
            raise UserError(
                problem, f'Add "references" with at least {MIN_VQA_ANSWERS} answers, or set task: classify.'
            )
    names = {"answer type": "answer_type", "question type": "question_type"}
    kinds = {title: facts_of(records, name) for title, name in names.items() if have_fact(records, name)}
    return vqa_accuracy.measure(predictions_of(records), references_of(records), groups_of(records, "image_id"), kinds)


@register_task(name="vqa")
def make_task() -> Task:
    return Task(
        score=_vqa,
        submission=partial(result_file, "question_id", "question_id", "answer"),
        validate_target=validate_vqa_target,
    )
