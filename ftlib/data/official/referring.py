"""Boxes of referring expressions from JSONL: `{"id", "box": [x_min, y_min, x_max, y_max]}` in pixels, in both files.

References may name their `image`. A prediction of null, or of a box without extent, is no box: it is wrong and counted
as invalid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.data.official.rows import Row, only, read_answers, read_rows
from ftlib.metrics import boxes
from ftlib.metrics.boxes import Box
from ftlib.metrics.totals import Measured


def read_references(path: Path) -> list[Row[Box]]:
    """Read the boxes that are asked for: x_min, y_min, x_max, y_max in pixels.

    Raises:
        UserError: the file is malformed, ids occur twice, a box has no extent.
    """
    return read_rows(path, {"box": list}, _expected)


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """Accuracy at an IoU of .5.

    Args:
        references: one JSONL file.

    Raises:
        UserError: malformed files, or not the same ids in both.
    """
    rows = read_references(only(references, "refer"))
    answers = read_answers(predictions, {"box": (list, type(None))}, _answered, rows)
    return boxes.accuracy(answers, [row.expected for row in rows], [row.group for row in rows])


def _expected(record: dict[str, Any]) -> Box:
    box = _answered(record)
    if box is None:
        raise ValueError(f"field box: x_min < x_max and y_min < y_max are needed, found {record['box']}")
    return box


def _answered(record: dict[str, Any]) -> Box | None:
    numbers = record["box"]
    if numbers is None:
        return None
    if len(numbers) != 4 or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"field box: four numbers x_min, y_min, x_max, y_max are needed, found {numbers}"[:200])
    left, top, right, bottom = map(float, numbers)
    return (left, top, right, bottom) if left < right and top < bottom else None
