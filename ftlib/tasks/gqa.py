"""GQA: accuracy by question type, consistency, validity, plausibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftlib.core.registry import register_task
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.tasks.base import PredictionRecord, Task, expected_of

if TYPE_CHECKING:
    from ftlib.metrics.base import MetricResult


def validate_gqa_target(row: Example) -> str:
    """Check the fields of GQA's questions, which its metrics need."""
    from ftlib.data.sources.gqa import parse_question

    try:
        parse_question({"question": row.prefix, "answer": row.suffix, "imageId": row.image} | row.facts)
    except ValueError as error:
        return str(error)
    return ""


def _gqa(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    """GQA's metrics use the balanced questions; the others, which only consistency uses, are scored separately."""
    from ftlib.data.sources.gqa import parse_question
    from ftlib.metrics import gqa as metrics_gqa

    questions = {}
    for record in records:
        fields = {"question": record["prompt"], "answer": expected_of(record), "imageId": record["image"]}
        try:
            question = parse_question(fields | record.get("facts", {}))
        except ValueError as error:
            remedy = "Rows of task gqa need the fields of GQA's questions (isBalanced, types, groups, entailed, …)."
            raise UserError(f"row {record['id']}: {error}", remedy) from None
        part = f"{record['dataset']}/" if "dataset" in record else ""
        questions[record["id"]] = replace(question, entailed=tuple(f"{part}{key}" for key in question.entailed))
    found = metrics_gqa.measure(questions, {record["id"]: record["prediction"] for record in records})
    rows = [float(record["prediction"] == expected_of(record)) for record in records]
    return replace(found, rows=rows, n=len(records))


def _gqa_results(records: Sequence[PredictionRecord]) -> list[dict[str, Any]]:
    return [{"questionId": record["id"], "prediction": record["prediction"]} for record in records]


@register_task(name="gqa")
def make_task() -> Task:
    return Task(
        score=_gqa,
        submission=_gqa_results,
        validate_target=validate_gqa_target,
    )
