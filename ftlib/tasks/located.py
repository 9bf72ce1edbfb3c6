"""Boxes and masks in the rows of tasks `detect`, `refer` and `segment`.

A row's facts may contain the exact ground truth in pixels. All tasks: `width`, `height`. `detect`: `objects`, a list of
`{"label", "box": [x_min, y_min, x_max, y_max]}`, optionally with `area`, `crowd` and `category_id`. `refer`: `box`, as
above. `segment`: `mask`, COCO's run lengths or polygons with their `size`. Missing boxes are read from the expected
answer, whose resolution is 1/1023 of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ftlib.data.example import Example
from ftlib.data.json_boxes import parse_answer
from ftlib.data.location_tokens import Box, LocatedObject, exceeds_image, to_pixels, tolerance
from ftlib.errors import UserError
from ftlib.tasks.base import PredictionRecord


def box_facts_fault(row: Example, field: str, known: list[tuple[str, Box]], answered: list[tuple[str, Box]]) -> str:
    """Check that boxes of a row's facts are inside the image, and that the answer's boxes match them.

    Args:
        known: label and box of each, in pixels.
        answered: label and box of each, as fractions.
    """
    width, height = row_size(row) or (1.0, 1.0)
    for number, (label, box) in enumerate(known, 1):
        if exceeds_image(box, width, height):
            what = f"{field}: object {number} ({label})" if label else field
            size = f"{width:g} × {height:g} pixels"
            return f"field {what}: x_min, y_min, x_max, y_max {_shown(box)} exceed the image of {size}"[:300]
    reach = [2 * tolerance(edge) for edge in (width, height)] * 2
    for number, (label, box) in enumerate(answered, 1):
        here = to_pixels(box, width, height)
        if not any(
            label == other and all(abs(a - b) <= most for a, b, most in zip(here, edges, reach, strict=True))
            for other, edges in known
        ):
            what = f"object {number} ({label})" if label else "the box"
            problem = f"field suffix: {what} is x_min, y_min, x_max, y_max {_shown(here)}"
            return f"{problem}, but field {field} has no such box (order as here, in pixels)"[:300]
    return ""


def validate_image_size(row: Example, size: tuple[int, int]) -> str:
    """Check that width and height of a row, and of its mask, are those of its image after EXIF rotation.

    Args:
        size: width and height of the image file in pixels.
    """
    told = [row_size(row)]
    if isinstance(mask := row.facts.get("mask"), dict):
        told.append((mask["size"][1], mask["size"][0]))
    other = next((one for one in told if one not in (None, size)), None)
    if other is None:
        return ""
    problem = f"{row.image}: {size[0]} × {size[1]} pixels, but its annotation has {other[0]:g} × {other[1]:g}"
    if other == size[::-1]:
        return f"{problem}: width and height are swapped (annotated without its EXIF orientation?)"
    return f"{problem}: boxes and masks must have the image's size"


def as_record(row: Example) -> PredictionRecord:
    return {"id": row.id, "facts": row.facts, "references": [row.suffix]}


def row_size(row: Example) -> tuple[float, float] | None:
    return size_of(as_record(row))


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{edge:.5g}" for edge in box) + "]"


def parse_single_object(text: str, facts: Mapping[str, Any] = MappingProxyType({})) -> LocatedObject | None:
    """Return the object of an answer with exactly one object; None for any other answer."""
    parsed = parse_answer(text, facts)
    return parsed.objects[0] if len(parsed.objects) == 1 and not parsed.unreadable else None


def row_facts(record: PredictionRecord) -> dict[str, Any]:
    facts: dict[str, Any] = record.get("facts", {})
    return facts


def images_of(records: Sequence[PredictionRecord]) -> list[Any]:
    return [(record.get("dataset"), row_facts(record).get("image_id", record["image"])) for record in records]


def size_of(record: PredictionRecord) -> tuple[float, float] | None:
    """Return width and height in pixels; None if the row lacks them."""
    edges: list[Any] = [row_facts(record).get(name) for name in ("width", "height")]
    width, height = (float(edge) if type(edge) in (int, float) else 0.0 for edge in edges)
    return (width, height) if width > 0 and height > 0 else None


def is_box(value: Any) -> bool:
    """Whether a value is a box; it may be empty, as some in COCO."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    finite = all(type(edge) in (int, float) and math.isfinite(edge) for edge in value)
    return finite and value[0] <= value[2] and value[1] <= value[3]


def require(condition: Any, record: PredictionRecord, what: str) -> None:
    if not condition:
        raise UserError(f"row {record['id']}: needs {what}")
