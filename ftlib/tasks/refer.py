"""Boxes of referring expressions. JSONL of references and predictions: `{"id", "box": [x_min, y_min, x_max, y_max]}`.

Boxes are in pixels. References may have `image`. A prediction of null, or of an empty box, is wrong and counts as
invalid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.core.registry import register_task
from ftlib.data.example import Example
from ftlib.data.json_boxes import answer_errors, box_syntax, parse_answer
from ftlib.data.location_tokens import to_fractions, to_pixels
from ftlib.data.sources.records import Reference, read_predictions, read_reference_rows, single_file
from ftlib.errors import UserError
from ftlib.metrics import coco_ap
from ftlib.metrics.base import MetricResult
from ftlib.metrics.coco_ap import Box
from ftlib.tasks.base import PredictionRecord, Task
from ftlib.tasks.located import (
    as_record,
    box_facts_fault,
    images_of,
    is_box,
    parse_single_object,
    require,
    row_facts,
    row_size,
    size_of,
    validate_image_size,
)


def read_references(path: Path) -> list[Reference[Box]]:
    """Read the expected boxes: x_min, y_min, x_max, y_max in pixels.

    Raises:
        UserError: the file is malformed, ids are not unique, a box is empty.
    """
    return read_reference_rows(path, {"box": list}, _expected)


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return the accuracy at an IoU of 0.5.

    Args:
        references: one JSONL file.

    Raises:
        UserError: malformed files, or different ids in both.
    """
    rows = read_references(single_file(references, "refer"))
    answers = read_predictions(predictions, {"box": (list, type(None))}, _answered, rows)
    return coco_ap.accuracy(answers, [row.expected for row in rows], [row.group for row in rows])


def _expected(record: dict[str, Any]) -> Box:
    box = _answered(record)
    if box is None:
        raise ValueError(f"field box: must have x_min < x_max and y_min < y_max, got {record['box']}")
    return box


def _answered(record: dict[str, Any]) -> Box | None:
    numbers = record["box"]
    if numbers is None:
        return None
    if len(numbers) != 4 or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"field box: must be four numbers x_min, y_min, x_max, y_max, got {numbers}"[:200])
    left, top, right, bottom = map(float, numbers)
    return (left, top, right, bottom) if left < right and top < bottom else None


def validate_refer_target(row: Example) -> str:
    """Check that the answer is one object (a label is optional) that matches the field `box`, if there is one."""
    wrong = answer_errors(row.suffix, row.facts)
    parsed = parse_answer(row.suffix, row.facts)
    if not wrong and len(parsed.objects) != 1:
        wrong = [f"{len(parsed.objects)} boxes"]
    if wrong:
        return f"field suffix: {wrong[0]}; must be one box ({box_syntax(row.facts)}), got {row.suffix!r}"[:300]
    if row.facts.get("box") is None:
        return ""
    try:
        box = expected_box(as_record(row))
    except UserError as error:
        return f"field box: {error.problem.removeprefix(f'row {row.id}: ')}"[:300]
    width, height = row_size(row) or (1.0, 1.0)
    return box_facts_fault(row, "box", [("", to_pixels(box, width, height))], [("", parsed.objects[0].box)])


def _refer(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    return score_referring(records)


@register_task(name="refer")
def make_task() -> Task:
    return Task(
        score=_refer,
        validate_target=validate_refer_target,
        validate_image_size=validate_image_size,
    )


def score_referring(records: Sequence[PredictionRecord]) -> MetricResult:
    """Return the accuracy of one box per expression. An answer that is not exactly one object is invalid, and wrong.

    Raises:
        UserError: an expected answer is not one box.
    """
    asked = [expected_box(record) for record in records]
    return coco_ap.accuracy([_answered_box(record) for record in records], asked, images_of(records))


def expected_box(record: PredictionRecord) -> Box:
    """Return the expected box of a row: x_min, y_min, x_max, y_max as fractions.

    Raises:
        UserError: the row has none.
    """
    box, size = row_facts(record).get("box"), size_of(record)
    if box is not None:
        require(is_box(box) and size, record, "a box [x_min, y_min, x_max, y_max], width and height")
        return to_fractions(tuple(box), *(size or (1, 1)))
    one = parse_single_object(record["references"][0], row_facts(record))
    require(one, record, f"an expected answer of one box ({box_syntax(row_facts(record))})")
    assert one
    return one.box


def _answered_box(record: PredictionRecord) -> Box | None:
    one = parse_single_object(record["prediction"], row_facts(record))
    return one.box if one else None
