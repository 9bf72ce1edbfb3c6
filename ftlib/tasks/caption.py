"""Captions of images: CIDEr-D, BLEU, METEOR, ROUGE-L, SPICE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ftlib.core.registry import register_task
from ftlib.tasks.base import PredictionRecord, Task, image_of, result_file

if TYPE_CHECKING:
    from ftlib.metrics.base import MetricResult


def _caption(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    """Score one caption per image (and part of a mixture), even if an image has several rows."""
    from ftlib.metrics import captions

    references: dict[tuple[str, str], list[str]] = {}
    predictions: dict[tuple[str, str], str] = {}
    for record in records:
        known = references.setdefault(_picture(record), [])
        known += [text for text in record["references"] if text not in known]
        predictions.setdefault(_picture(record), record["prediction"])
    found = captions.measure(references, predictions)
    by_image = dict(zip(references, found.rows or (), strict=True))
    return replace(found, rows=[by_image[_picture(record)] for record in records])


def _picture(record: PredictionRecord) -> tuple[str, str]:
    return record.get("dataset", ""), image_of(record)


@register_task(name="caption")
def make_task() -> Task:
    return Task(
        score=_caption,
        submission=partial(result_file, "image_id", "image_id", "caption"),
    )
