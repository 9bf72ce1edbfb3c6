"""Boxes and masks in the rows of tasks `detect`, `refer` and `segment`: what was asked for and what was answered.

A row's facts may say exactly what is in its image, in pixels. All: `width`, `height`. `detect`: `objects`, a list of
`{"label", "box": [x_min, y_min, x_max, y_max]}`, perhaps with `area`, `crowd` and `category_id`. `refer`: `box`, as
above. `segment`: `mask`, COCO's run lengths or polygons with their `size`. Boxes that are not there are read from the
expected answer, which has them to a 1023rd of the image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from ftlib.data.loc_tokens import Located, Parsed, parse, to_fractions, to_pixels
from ftlib.data.official.segmentation import read_mask
from ftlib.errors import UserError
from ftlib.metrics import boxes, masks
from ftlib.metrics.average_precision import RANGES
from ftlib.metrics.boxes import Box, Detection, Object
from ftlib.metrics.masks import Mask
from ftlib.metrics.matching import THRESHOLDS, overlaps
from ftlib.metrics.totals import Array, Measured, Sample

Record = dict[str, Any]

RANKED = "ranked by order of mention"
"""PaliGemma gives its boxes no score. What it names first counts as surest: 1, 1/2, 1/3 … of an answer."""


@dataclass(frozen=True)
class _Scene:
    """A row of `detect`.

    Attributes:
        size: width and height in pixels; 1, 1 where they are unknown.
        objects: what is there: label, box (x_min, y_min, x_max, y_max in pixels), area in square pixels, crowd.
        answer: what the model named.
    """

    image: int
    size: tuple[float, float]
    objects: list[tuple[str, Box, float, bool]]
    answer: Parsed


def measure_detections(records: Sequence[Record]) -> Measured:
    """COCO's average precision of generated boxes. Rows of one image are scored together.

    An answer with a fragment that is no box, or with a label that no expected answer of the split has, is invalid; its
    other boxes count. A row's own score, which COCO does not define, is the F1 of its boxes at an IoU of .5.

    Raises:
        UserError: rows whose expected answers are no boxes.
    """
    scenes = _scenes(records)
    labels = _labels(scenes)
    objects = [(scene.image, *one) for scene in scenes for one in scene.objects]
    truth = [
        Object(number, image, labels.index(label), _sized(box), area, crowd)
        for number, (image, label, box, area, crowd) in enumerate(objects, 1)
    ]
    found = [one for scene in scenes for one in _detections(scene, labels)]
    measured = boxes.average_precision(sorted({scene.image for scene in scenes}), truth, found)
    unknown = [[one.label for one in scene.answer.objects if one.label not in labels] for scene in scenes]
    measured = replace(
        measured,
        rule=f"{measured.rule}, {RANKED}",
        rows=[_f1(scene) for scene in scenes],
        invalid=sum(bool(scene.answer.unreadable or names) for scene, names in zip(scenes, unknown, strict=True)),
        tables={
            "unreadable fragments": sum(scene.answer.unreadable for scene in scenes),
            "unknown labels": dict(Counter(chain.from_iterable(unknown)).most_common()),
        },
    )
    return measured if _all_sized(records) else _without_areas(measured)


def detection_results(records: Sequence[Record]) -> list[dict[str, Any]] | None:
    """COCO's result file; None where the rows do not carry their images' sizes.

    Without a `category_id` in the rows' objects categories are numbered from 1 in the order of their labels.
    """
    if not _all_sized(records):
        return None
    scenes = _scenes(records)
    labels = _labels(scenes)
    listed = [one for record in records for one in _facts(record).get("objects", [])]
    official = {one["label"]: one["category_id"] for one in listed if "category_id" in one}
    numbers = official if set(labels) <= set(official) else {label: n for n, label in enumerate(labels, 1)}
    results = []
    for record, scene in zip(records, scenes, strict=True):
        image = _facts(record).get("image_id", record["id"])
        for one in _detections(scene, labels):
            identity = {"image_id": _number(image), "category_id": numbers[labels[one.category]]}
            results.append({**identity, "bbox": [round(edge, 3) for edge in one.box], "score": one.score})
    return results


def measure_referred(records: Sequence[Record]) -> Measured:
    """Accuracy of one box for each expression. An answer that is not exactly one object is invalid, and wrong.

    Raises:
        UserError: rows whose expected answer is not one box.
    """
    asked = [_referred(record) for record in records]
    return boxes.accuracy([_answered_box(record) for record in records], asked, _images(records))


def answered_object(text: str) -> Located | None:
    """The one object that an answer names; None for an answer that is anything else."""
    parsed = parse(text)
    return parsed.objects[0] if len(parsed.objects) == 1 and not parsed.unreadable else None


def measure_masks(records: Sequence[Record]) -> Measured:
    """Mean and cumulative IoU of the rows' `mask` (what the answer's codes stand for; null if it has none).

    Raises:
        UserError: rows without the mask that is expected, or answers whose codes were not decoded.
    """
    answered = []
    for record in records:
        if "mask" not in record:
            raise UserError(f"row {record['id']}: the answer's mask was not decoded", "Set evaluation.mask_decoder.")
        answered.append(None if record["mask"] is None else read_mask(record["mask"]))
    return masks.measure(answered, [expected_mask(record) for record in records], _images(records))


def expected_mask(record: Record) -> Mask:
    """The mask that a row of `segment` asks for.

    Raises:
        UserError: it has none.
    """
    try:
        return read_mask(_facts(record)["mask"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        remedy = 'Rows of task segment carry the mask itself: {"size": [height, width], "polygons": …, or "counts": …}.'
        reason = "field mask is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"row {record['id']}: {reason}", remedy) from None


def _scenes(records: Sequence[Record]) -> list[_Scene]:
    places: dict[Any, int] = {}
    scenes = []
    for record in records:
        size = _size(record) or (1.0, 1.0)
        objects = _listed(record) if "objects" in _facts(record) else _read(record, size)
        image = places.setdefault(record["image"], len(places))
        scenes.append(_Scene(image, size, objects, parse(record["prediction"])))
    return scenes


def _labels(scenes: Sequence[_Scene]) -> list[str]:
    return sorted({label for scene in scenes for label, *_ in scene.objects})


def _listed(record: Record) -> list[tuple[str, Box, float, bool]]:
    """Objects as the facts have them, in pixels."""
    objects = _facts(record)["objects"]
    _require(isinstance(objects, list) and _size(record), record, "a list of objects, width and height")
    found = []
    for one in objects:
        right = isinstance(one, dict) and isinstance(one.get("label"), str) and _is_box(one.get("box"))
        _require(right, record, 'objects with a "label" and a "box" [x_min, y_min, x_max, y_max]')
        box = one["box"]
        area = one.get("area", (box[2] - box[0]) * (box[3] - box[1]))
        _require(type(area) in (int, float) and area >= 0, record, "objects whose area is a number of square pixels")
        found.append((one["label"], tuple(box), float(area), bool(one.get("crowd", False))))
    return found


def _read(record: Record, size: tuple[float, float]) -> list[tuple[str, Box, float, bool]]:
    """Objects as the expected answer has them."""
    parsed = parse(record["references"][0])
    _require(not parsed.unreadable, record, "an expected answer of boxes (<loc0000>… and a label)")
    found = [(one.label, to_pixels(one.box, *size)) for one in parsed.objects]
    return [(label, box, (box[2] - box[0]) * (box[3] - box[1]), False) for label, box in found]


def _detections(scene: _Scene, labels: Sequence[str]) -> list[Detection]:
    """What was named, of the labels that there are."""
    return [
        Detection(scene.image, labels.index(one.label), _sized(to_pixels(one.box, *scene.size)), 1 / rank)
        for rank, one in enumerate(scene.answer.objects, 1)
        if one.label in labels
    ]


def _f1(scene: _Scene) -> float:
    """Of one row: each box finds at most one object of its label, the one that it overlaps most."""
    free = [(label, box) for label, box, _, crowd in scene.objects if not crowd]
    total = len(free) + len(scene.answer.objects) + scene.answer.unreadable
    hits = 0
    for one in scene.answer.objects:
        alike = [place for place, (label, _) in enumerate(free) if label == one.label]
        found = np.array([_sized(to_pixels(one.box, *scene.size))] * len(alike)).reshape(-1, 4)
        shares = overlaps(found, np.array([_sized(free[place][1]) for place in alike]).reshape(-1, 4))
        if len(shares) and shares.max() >= THRESHOLDS[0]:
            free.pop(alike[int(shares.argmax())])
            hits += 1
    return 2 * hits / total if total else 1.0


def _referred(record: Record) -> Box:
    """The box that is asked for, as fractions."""
    box, size = _facts(record).get("box"), _size(record)
    if box is not None:
        _require(_is_box(box) and size, record, "a box [x_min, y_min, x_max, y_max], width and height")
        return to_fractions(tuple(box), *(size or (1, 1)))
    one = answered_object(record["references"][0])
    _require(one, record, "an expected answer of one box (<loc0000>…)")
    assert one
    return one.box


def _answered_box(record: Record) -> Box | None:
    one = answered_object(record["prediction"])
    return one.box if one else None


def _without_areas(measured: Measured) -> Measured:
    """Small, medium and large are numbers of pixels."""
    names = [name for name in measured.values() if name.split(": ")[-1] in RANGES]
    notes = dict.fromkeys(names, "the rows do not carry their images' width and height")
    return replace(measured, sample=_Some(measured.sample, frozenset(names)), notes=notes)


@dataclass(frozen=True)
class _Some:
    """A sample without some of its metrics."""

    whole: Sample
    left_out: frozenset[str]

    @property
    def groups(self) -> Sequence[Hashable]:
        return self.whole.groups

    def values(self, weights: Array) -> dict[str, Array]:
        return {name: value for name, value in self.whole.values(weights).items() if name not in self.left_out}


def _facts(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = record.get("facts", {})
    return facts


def _images(records: Sequence[Record]) -> list[Any]:
    return [(record.get("dataset"), _facts(record).get("image_id", record["image"])) for record in records]


def _size(record: Record) -> tuple[float, float] | None:
    """Width and height in pixels, if the row has them."""
    edges: list[Any] = [_facts(record).get(name) for name in ("width", "height")]
    width, height = (float(edge) if type(edge) in (int, float) else 0.0 for edge in edges)
    return (width, height) if width > 0 and height > 0 else None


def _all_sized(records: Sequence[Record]) -> bool:
    return all(_size(record) for record in records)


def _is_box(value: Any) -> bool:
    """The release of COCO has boxes without extent."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    finite = all(type(edge) in (int, float) and math.isfinite(edge) for edge in value)
    return finite and value[0] <= value[2] and value[1] <= value[3]


def _require(condition: Any, record: Record, what: str) -> None:
    if not condition:
        raise UserError(f"row {record['id']}: needed is {what}")


def _sized(box: Box) -> Box:
    """x_min, y_min, x_max, y_max → x, y, width, height."""
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def _number(key: Any) -> Any:
    """Servers expect the numbers of the release, which a row's id holds as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
