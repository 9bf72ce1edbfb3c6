"""COCO's object detection: instances and result files.

Release: `{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations": [{"id",
"image_id", "category_id", "bbox", "area", "iscrowd"}]}`. Results: `[{"image_id", "category_id", "bbox", "score"}]`.
`bbox` is x, y, width, height in pixels. Source: cocodataset.org, "Data format" and "Results format".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.examples import raise_faults
from ftlib.data.official.results import (
    Types,
    by_id,
    check_records,
    name_ids,
    read_json_file,
    read_records,
    require_fields,
)
from ftlib.errors import UserError
from ftlib.metrics import boxes
from ftlib.metrics.boxes import Box, Detection, Object
from ftlib.metrics.totals import Measured

_NUMBER: tuple[type, ...] = (int, float)
_ANNOTATION: Types = {"id": int, "image_id": int, "category_id": int, "bbox": list, "area": _NUMBER}
_RESULT: Types = {"image_id": int, "category_id": int, "bbox": list, "score": _NUMBER}
_REMEDY = "Mend the file; nothing was scored."


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the release; what the file leaves out is None."""

    id: int
    file_name: str | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Instances:
    """A split of the release.

    Attributes:
        pictures: image id → image, all of the split, with objects or without.
        categories: category id → name.
        objects: in the order of the file.
    """

    pictures: dict[int, Picture]
    categories: dict[int, str]
    objects: list[Object]


def read_instances(path: Path) -> Instances:
    """Read a split of the release.

    Raises:
        UserError: the file is malformed, ids occur twice, or annotations are of images or categories that it lacks.
    """
    content = read_json_file(path)
    names = ("images", "categories", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        raise UserError(f"{path}: no COCO instances file: lists of images, categories and annotations are needed")
    checked = {}
    for name, what in zip(names, ("image", "category record", "annotation"), strict=True):
        check_records(path, content[name], _ANNOTATION if what == "annotation" else {"id": int}, what)
        checked[name] = by_id(path, content[name], "id")
    pictures = {key: _picture(path, record) for key, record in checked["images"].items()}
    categories = {key: str(record.get("name", key)) for key, record in checked["categories"].items()}
    _require_known(path, content["annotations"], pictures, categories)
    faults = [fault for record in content["annotations"] if (fault := _object_fault(record))]
    raise_faults([f"{path}: {fault}" for fault in faults], _REMEDY)
    return Instances(pictures, categories, [_object(record) for record in content["annotations"]])


def read_results(path: Path, instances: Instances) -> list[Detection]:
    """Read a result file. Images without detections are legal, a file without any is not.

    Raises:
        UserError: the file is malformed or empty, or has images or categories that the release lacks.
    """
    records = read_records(path, _RESULT)
    _require_known(path, records, instances.pictures, instances.categories)
    faults = []
    for number, record in enumerate(records, 1):
        if fault := _box_fault(record["bbox"]):
            faults.append(f"{path}: record {number}: {fault}")
        if not math.isfinite(record["score"]):
            faults.append(f"{path}: record {number}: field score: a finite number is needed, found {record['score']}")
    raise_faults(faults, _REMEDY)
    return [
        Detection(record["image_id"], record["category_id"], _box(record["bbox"]), float(record["score"]))
        for record in records
    ]


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """COCO's average precision and recall.

    Args:
        references: the split's instances file.

    Raises:
        UserError: malformed files, or results of another split.
    """
    if len(references) != 1:
        raise UserError(f"detect needs one reference file, the instances of the split; got {len(references)}")
    instances = read_instances(references[0])
    return boxes.average_precision(list(instances.pictures), instances.objects, read_results(predictions, instances))


def parse_picture(record: dict[str, Any]) -> Picture:
    """Parse an image record of the release.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, {"id": int})
    name, width, height = (record.get(field) for field in ("file_name", "width", "height"))
    if not isinstance(name, (str, type(None))) or not all(isinstance(n, (int, type(None))) for n in (width, height)):
        raise ValueError("file_name must be text, width and height whole numbers")
    return Picture(record["id"], name, width, height)


def parse_object(record: dict[str, Any]) -> Object:
    """Parse an annotation of the release.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, _ANNOTATION)
    if fault := _object_fault(record):
        raise ValueError(fault)
    return _object(record)


def _require_known(
    path: Path, records: Sequence[dict[str, Any]], pictures: dict[int, Picture], categories: dict[int, str]
) -> None:
    problems = []
    for field, known in (("image_id", set(pictures)), ("category_id", set(categories))):
        if unknown := {record[field] for record in records} - known:
            problems.append(f"{path}: {len(unknown)} {field}s that the references do not have: {name_ids(unknown)}")
    if problems:
        raise UserError("\n".join(problems), "Results and references must be of the same split.")


def _picture(path: Path, record: dict[str, Any]) -> Picture:
    try:
        return parse_picture(record)
    except ValueError as error:
        raise UserError(f"{path}: image {record['id']}: {error}") from None


def _object(record: dict[str, Any]) -> Object:
    crowd = bool(record.get("iscrowd", 0))
    box = _box(record["bbox"])
    return Object(record["id"], record["image_id"], record["category_id"], box, float(record["area"]), crowd)


def _object_fault(record: dict[str, Any]) -> str | None:
    if fault := _box_fault(record["bbox"]):
        return f"annotation {record['id']}: {fault}"
    if not (math.isfinite(record["area"]) and record["area"] >= 0):
        return f"annotation {record['id']}: field area: no area: {record['area']}"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"annotation {record['id']}: field iscrowd: 0 or 1 expected, found {record['iscrowd']!r}"[:200]
    return None


def _box(numbers: list[float]) -> Box:
    x, y, width, height = map(float, numbers)
    return x, y, width, height


def _box_fault(numbers: list[Any]) -> str | None:
    right = len(numbers) == 4 and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if right and numbers[2] >= 0 and numbers[3] >= 0:
        return None
    return f"field bbox: four numbers x, y, width, height are needed, found {numbers}"[:200]
