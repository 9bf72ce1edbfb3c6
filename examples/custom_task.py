"""A task of its own: text is judged by its character error rate, of which lower is better.

Used by examples/custom_task.yaml. The arguments of the decorator are literals, since ftlib reads them without running
this file: `ftlib status` and `ftlib report` never do.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from ftlib.core.registry import register_task
from ftlib.data.example import Example
from ftlib.metrics.base import GroupedSums, MetricResult
from ftlib.tasks.base import PredictionRecord, Task


def score(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    """Edits that turn the predictions into the expected texts, per expected character; and the share of equal texts.

    A rate is a ratio of two sums, so `GroupedSums` gives its confidence interval and paired tests.
    """
    wanted = [record["references"][0].strip() for record in records]
    edits = [Levenshtein.distance(record["prediction"], text) for record, text in zip(records, wanted, strict=True)]
    equal = [record["prediction"] == text for record, text in zip(records, wanted, strict=True)]
    sums = GroupedSums([record["image"] or record["id"] for record in records])  # rows of an image are not independent
    sums.add_ratio("CER", edits, list(map(len, wanted)))
    sums.add_ratio("exact match", equal)
    return MetricResult(
        rule="character-error-rate/1",  # with its version: scores of different rules are not compared
        headline="CER",
        unit="fraction",
        sample=sums,
        n=len(records),
        rows=[edit / len(text) for edit, text in zip(edits, wanted, strict=True)],
    )


def validate_target(row: Example) -> str:
    """Why a row cannot be learned or scored; ftlib prepare reports it with file and line."""
    return "" if row.suffix else "field suffix: the expected text is empty"


@register_task(
    name="transcribe",
    title="transcription",
    metrics={"CER": {"higher_is_better": False}, "exact match": {"higher_is_better": True}},
)
def make_task() -> Task:
    return Task(score=score, validate_target=validate_target)
