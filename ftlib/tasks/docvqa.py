"""Questions about documents: ANLS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ftlib.core.registry import register_task
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


def _docvqa(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    from ftlib.metrics import anls

    kinds = {"question type": facts_of(records, "question_types")} if have_fact(records, "question_types") else {}
    return anls.measure(predictions_of(records), references_of(records), groups_of(records, "docId"), kinds)


@register_task(name="docvqa")
def make_task() -> Task:
    return Task(
        score=_docvqa,
        submission=partial(result_file, "questionId", "questionId", "answer"),
    )
