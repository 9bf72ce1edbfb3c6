"""Boxes as text of JSON, as Qwen-VL writes them: `[{"bbox_2d": [x_min, y_min, x_max, y_max], "label": "cat"}, …]`.

Numbers are pixels of the image file (`json_pixels`; Qwen2.5-VL: pixels of the image as it sees it, which is the file
where the processor resizes nothing) or thousandths of the image's width and height (`json_1000`; Qwen2-VL, Qwen3-VL,
InternVL). The text does not say which: `data.box_format` does, and every row keeps it in its facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftlib.data.example import Example, InvalidRecord
from ftlib.data.location_tokens import (
    Box,
    LocatedObject,
    ParsedObjects,
    exceeds_image,
    find_errors,
    parse_objects,
    to_fractions,
    to_pixels,
)

if TYPE_CHECKING:
    from ftlib.data.scan import RowTransform

BOX_FORMAT = "box_format"
"""The field of a row's facts that says in which form its answers have boxes; without it, in location tokens."""

THOUSANDTHS, PIXELS = "json_1000", "json_pixels"
_ENDLESS = 1e9
"""No number of a box is as large; the areas of larger ones would overflow."""

_START = re.compile(r"\{")
_READ = json.JSONDecoder()
_BOX = re.compile(r'"bbox_2d"\s*:\s*\[([^\]]*)\]')
_LABEL = re.compile(r'"label"\s*:\s*"((?:[^"\\]|\\.)*)"')


def parse_answer(text: str, facts: Mapping[str, Any]) -> ParsedObjects:
    """The objects of an answer in its row's form; never fails. An empty text has no objects."""
    size = _unit(facts)
    return parse_objects(text) if size is None else parse_json_objects(text, *size)


def answer_errors(text: str, facts: Mapping[str, Any]) -> list[str]:
    """A message for each object of an expected answer that cannot be read in its row's form."""
    size = _unit(facts)
    if size is None:
        return find_errors(text)
    parsed = parse_json_objects(text, *size)
    form = '[{"bbox_2d": [x_min, y_min, x_max, y_max], "label": "…"}]'
    if parsed.unreadable:
        return [f"{parsed.unreadable} of its objects cannot be read as {form}"]
    unit = f"pixels of an image of {size[0]:g} × {size[1]:g}" if facts[BOX_FORMAT] == PIXELS else "thousandths"
    return [
        f"object {number}: its box is outside of the image ({BOX_FORMAT}: {facts[BOX_FORMAT]} are {unit})"
        for number, one in enumerate(parsed.objects, 1)
        if exceeds_image(to_pixels(one.box, *size), *size)
    ]


def box_syntax(facts: Mapping[str, Any]) -> str:
    """What a box is in a row's form, for messages."""
    return "four <locYYYY> tokens" if facts.get(BOX_FORMAT) is None else '"bbox_2d": [x_min, y_min, x_max, y_max]'


def _unit(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """Width and height of the image in the answer's numbers; None: in location tokens."""
    form = facts.get(BOX_FORMAT)
    if form == PIXELS:
        return float(facts["width"]), float(facts["height"])
    return (1000.0, 1000.0) if form == THOUSANDTHS else None


def parse_json_objects(text: str, width: float, height: float) -> ParsedObjects:
    """Parse a model's output; never fails.

    The list may stand in a Markdown block, or be cut off: what is whole counts, and the rest as an unreadable fragment.

    Args:
        width, height: of the image, in the numbers of the text.
    """
    objects: list[LocatedObject] = []
    unreadable = place = 0
    while found := _START.search(text, place):
        try:
            value, place = _READ.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            unreadable += 1
            break
        if one := _object(value, width, height):
            objects.append(one)
        else:
            unreadable += 1
    plain = re.sub(r"```(json)?", "", text).strip()
    if not objects and not unreadable and plain not in ("", "[]"):
        unreadable = 1
    return ParsedObjects(objects, unreadable)


def json_object_spans(text: str) -> list[tuple[range, range]]:
    """Return where the objects of `parse_json_objects` are in the text: characters of the numbers, of the label."""
    spans = []
    place = 0
    while found := _START.search(text, place):
        try:
            value, place = _READ.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            break
        box, label = _BOX.search(text, found.start(), place), _LABEL.search(text, found.start(), place)
        if box and _object(value, 1.0, 1.0):
            spans.append((range(*box.span(1)), range(*label.span(1)) if label else range(0)))
    return spans


def _object(value: Any, width: float, height: float) -> LocatedObject | None:
    if not isinstance(value, dict):
        return None
    box, label = value.get("bbox_2d"), value.get("label", "")
    if not isinstance(box, list) or len(box) != 4 or not isinstance(label, str):
        return None
    if not all(type(edge) in (int, float) and abs(edge) < _ENDLESS for edge in box):  # not of NaN and infinity either
        return None
    left, top, right, bottom = box
    label = label.encode(errors="replace").decode()  # JSON can write half a surrogate pair, which no file can hold
    return LocatedObject(to_fractions((left, top, right, bottom), width, height), label) if _has_area(box) else None


def _has_area(box: Sequence[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def format_json_objects(objects: Sequence[LocatedObject], width: float, height: float) -> str:
    """Objects as text in whole numbers; `parse_json_objects` is the inverse. An empty label is left out.

    A box that rounding makes empty gets one more pixel, or thousandth.
    """
    listed = [
        {"bbox_2d": _whole(one.box, width, height), **({"label": one.label} if one.label else {})} for one in objects
    ]
    return json.dumps(listed, ensure_ascii=False)


def _whole(box: Box, width: float, height: float) -> list[int]:
    left, top, right, bottom = (round(edge * size) for edge, size in zip(box, (width, height) * 2, strict=True))
    return [left, top, max(right, left + 1), max(bottom, top + 1)]


def box_writer(form: str) -> RowTransform:
    """A transform that notes the form in every row's facts, and writes answers of location tokens in it.

    A row whose answer needs the image's size (fields `width` and `height`) and lacks it becomes invalid.
    """

    def write(row: Example | InvalidRecord) -> Example | InvalidRecord:
        if isinstance(row, InvalidRecord):
            return row
        sizes = [row.facts.get(name) for name in ("width", "height")]
        if form == PIXELS and not all(isinstance(size, int | float) and size > 0 for size in sizes):
            reason = f"data.box_format: {form} needs the fields width and height, in pixels of the image"
            return InvalidRecord(row.location, reason)
        facts = {**row.facts, BOX_FORMAT: form}
        unit = _unit(facts)
        assert unit is not None

        def written(text: str) -> str:
            located = "<loc" in text and not find_errors(text)
            return format_json_objects(parse_objects(text).objects, *unit) if located or not text.strip() else text

        return replace(row, suffix=written(row.suffix), references=[*map(written, row.references)], facts=facts)

    return write
