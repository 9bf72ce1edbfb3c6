"""COCO instances, from the release or any annotation tool: `detect cat ; dog` → boxes as location tokens.

Files in `data.root`, with or without the folders of the zips: `instances_{train,val}2014.json` or
`instances_{train,val}2017.json`; images in `train2014/` and so on. `data.file` selects a release by one of its files.
For other file names see `coco_files`. The prompt lists the categories in the image, in the file's order; with
`data.categories: all` it lists all categories, and images without boxes are used, too, with an empty answer. The answer
lists the boxes in the same order.

An answer never lacks a box: if an annotation is invalid, the prompt of its image does not list its category. Only an
annotation without a valid image is skipped alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data import location_tokens
from ftlib.data.example import Example, InvalidRecord, raise_all
from ftlib.data.labels import suspicious_labels
from ftlib.data.location_tokens import LocatedObject, exceeds_image, label_error
from ftlib.data.sources.base import JsonTable, NumberedFile, RowReader, invalid, read_tables, unused_fields
from ftlib.data.sources.coco_files import find_files, image_folder, is_official, part_name
from ftlib.data.sources.records import (
    Types,
    check_records,
    format_ids,
    index_by_id,
    match_ids,
    read_json_file,
    read_records,
    require_fields,
    shown_id,
    types_note,
)
from ftlib.data.sources.release_files import OfficialSplit, ReleaseFiles, image_name
from ftlib.errors import UserError
from ftlib.metrics import coco_ap
from ftlib.metrics.base import MetricResult
from ftlib.metrics.coco_ap import Box, Detection, GroundTruthObject, Id
from ftlib.metrics.segmentation import Mask, box_around, read_segmentation

_PREFIX = "instances_"
_YEARS: list[ReleaseFiles] = [
    {"train": f"{_PREFIX}train{year}.json", "valid": f"{_PREFIX}val{year}.json"} for year in (2014, 2017)
]
_COCO_DETECTION_ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
BOX_OUTSIDE_IMAGE = "boxes without extent inside the image"
IMAGE_WITHOUT_BOXES = "images without any box to ask for"


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: none is there, or those of several releases.
    """
    return list(find_files(data, [_YEARS], _PREFIX).values())


@register_source(name="coco_detection")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each image with objects. Answers do not contain crowd boxes; the facts contain all objects.

    Raises:
        UserError: missing files, files of both years, files that are not such JSON, boxes that are not x, y, width,
            height in pixels.
    """
    return _read(data, Counter())


def skipped_counts(data: Data) -> dict[str, int]:
    """Return reason → number of rows that `examples` skips. Reads the whole source again.

    Raises:
        UserError: as `examples`.
    """
    counts = Counter({BOX_OUTSIDE_IMAGE: 0, IMAGE_WITHOUT_BOXES: 0})
    for _ in _read(data, counts):
        pass
    return dict(counts)


def _read(data: Data, counts: Counter[str]) -> Iterator[Example | InvalidRecord]:
    root, reading = Path(data.root), RowReader()
    found = find_files(data, [_YEARS], _PREFIX)
    for part, path in found.items():
        # tools number the images of each split from the same start
        before = f"{part}-" if len(found) > 1 and not is_official(path, [_YEARS]) else ""
        yield from _InstancesFile(root, path, part, data.categories == "all", before, counts).rows(reading)


class _InstancesFile:
    """One annotation file.

    Args:
        everything: whether each prompt lists all categories.
        before: prefix of the rows' IDs.
        counts: counter of skipped rows by reason.
    """

    def __init__(
        self, root: Path, path: Path, part: OfficialSplit, everything: bool, before: str, counts: Counter[str]
    ) -> None:
        self.root, self.path, self.part = root, path, part
        self.everything, self.before, self.counts = everything, before, counts
        self.images: JsonTable[SizedImage] = JsonTable(
            "image", parse_sized_image, ("id", "file_name", "width", "height")
        )
        self.categories: JsonTable[str] = JsonTable("category", self._category, ("id", "name", "supercategory"))
        self.above: set[Any] = set()
        """Names that are the supercategory of other categories."""
        self.objects: JsonTable[GroundTruthObject] = JsonTable("annotation", self._object, _COCO_DETECTION_ANNOTATION)
        self.by_image: dict[Id, list[GroundTruthObject]] = {}
        self.asked_for: set[Id] = set()
        """Categories in every prompt, with `data.categories: all`."""
        self.invalid_images: dict[str, set[str]] = defaultdict(set)
        """Image → categories with an invalid box; "" for a box of unknown category. IDs are texts."""

    def rows(self, reading: RowReader) -> Iterator[Example | InvalidRecord]:
        """Yield the invalid records, then the rows."""
        lists: dict[str, JsonTable[Any]] = {
            "images": self.images,
            "categories": self.categories,
            "annotations": self.objects,
        }
        yield from read_tables(self.path, lists)
        self.unused = unused_fields(lists)
        yield from self._assign_to_images()
        self.remarks = frozenset(self._suspicious())
        names = [found.name for found in self.images.values.values()]
        folder = image_folder(self.root, self.path, _PREFIX, names)
        order = {key: number for number, key in enumerate(self.categories.values)}
        used = {one.category for objects in self.by_image.values() for one in objects}
        # Roboflow's first category is a supercategory without boxes
        self.asked_for = {
            key for key, label in self.categories.values.items() if label not in self.above or key in used
        }

        def parse(record: dict[str, Any], number: int) -> list[Example]:
            found = self.images.values[record["id"]]
            objects = sorted(self.by_image[found.id], key=lambda one: order[one.category])
            return self._row(found, folder, objects)

        records = zip(self.images.numbers, ({"id": key} for key in self.images.values), strict=True)
        yield from reading.rows(NumberedFile(self.path, "image"), records, parse)

    def _category(self, record: dict[str, Any]) -> tuple[Id, str]:
        require_fields(record, {"id": ID, "name": str}, {"supercategory": (str, type(None))})
        label = record["name"].strip()
        if problem := label_error(label):
            raise ValueError(f"field name: {problem}")
        if record.get("supercategory") != record["name"]:
            self.above.add(record.get("supercategory"))
        return record["id"], label

    def _object(self, record: dict[str, Any]) -> tuple[Any, GroundTruthObject]:
        number = len(self.objects.values) + 1
        try:
            _require_upright(record)
            one = parse_object(record, f"without id, number {number}")
        except ValueError:
            category = record.get("category_id")
            self._mark_invalid(record.get("image_id"), category if isinstance(category, ID) else "")
            raise
        if one.id in self.objects.values:
            self._mark_invalid(one.image, one.category)
        return one.id, one

    def _mark_invalid(self, image: Any, category: Any) -> None:
        self.invalid_images[str(image)].add(str(category))

    def _assign_to_images(self) -> Iterator[InvalidRecord]:
        """Assign the objects to their images; yields objects without an image or outside of it.

        Raises:
            UserError: as `require_pixels`.
        """
        objects = list(self.objects.values.values())
        images = match_ids({one.image for one in objects}, self.images.values)
        kinds = match_ids({one.category for one in objects}, self.categories.values)
        shown = ((one.box, self.images.values[images[one.image]]) for one in objects if one.image in images)
        require_pixels(self.path, ((box, found.width, found.height) for box, found in shown))
        self.by_image = {key: [] for key in self.images.values}
        for one in objects:
            location = f"{self.path}: annotation of id {shown_id(one.id)}"
            if one.image not in images or one.category not in kinds:
                yield invalid(location, "no such image or category")
                continue
            found, label = self.images.values[images[one.image]], self.categories.values[kinds[one.category]]
            if reason := outside_image_error(one.box, found):
                self._mark_invalid(found.id, kinds[one.category])
                yield invalid(location, f"{label} in {found.name}: {reason}")
            else:
                alike = (one.image, one.category) == (found.id, kinds[one.category])
                own = one if alike else replace(one, image=found.id, category=kinds[one.category])
                self.by_image[found.id].append(own)

    def _suspicious(self) -> Iterator[str]:
        """Yield messages about possible mistakes: similar category names, duplicate boxes."""
        used = Counter(one.category for objects in self.by_image.values() for one in objects)
        names: Counter[str] = Counter()
        for key, label in self.categories.values.items():
            if used[key]:
                names[label] += used[key]
        if len({self.categories.values[key] for key in used}) < len(used):
            yield f"{self.path.name}: several categories have the same name"
        alike = suspicious_labels(names) if len(names) > 1 else []
        yield from (f"{self.path.name}: category {told}" for told in alike)
        twice = [
            one
            for objects in self.by_image.values()
            for one, count in Counter((one.category, one.box) for one in objects).items()
            if count > 1
        ]
        if twice:
            label = self.categories.values[twice[0][0]]
            yield f"{self.path.name}: {len(twice):,} duplicate boxes, the first of them a {label}"

    def _row(self, found: SizedImage, folder: str, objects: Sequence[GroundTruthObject]) -> list[Example]:
        spoilt = self.invalid_images.get(str(found.id), set())
        if "" in spoilt:
            raise ValueError("one of its annotations is invalid and has no valid category")
        objects = [one for one in objects if str(one.category) not in spoilt]
        asked = [one for one in objects if not one.crowd and is_visible(one, found)]
        self.counts[BOX_OUTSIDE_IMAGE] += sum(not one.crowd for one in objects) - len(asked)
        named = {one.category for one in asked}
        if self.everything:
            unclear = {str(one.category) for one in objects if one.category not in named} | spoilt
            named = {key for key in self.asked_for if str(key) not in unclear}
        self.counts[IMAGE_WITHOUT_BOXES] += not named
        if not named:
            return []
        labels = self.categories.values
        prompt = "detect " + " ; ".join(dict.fromkeys(label for key, label in labels.items() if key in named))
        facts = _facts(found, objects, labels)
        name = image_name(folder, found.name)
        suffix = format_location_tokens(asked, found, labels)
        row = Example(f"{self.before}{found.id}", name, prompt, suffix, facts=facts, part=self.part)
        part = part_name(self.path, _PREFIX) if self.part else ""
        return [replace(row, part_name=part, unused=self.unused, remarks=self.remarks)]


def _require_upright(record: dict[str, Any]) -> None:
    """Reject rotated boxes, as CVAT writes them: their `bbox` is not rotated.

    Raises:
        ValueError: the box is rotated.
    """
    attributes = record.get("attributes")
    turn = attributes.get("rotation") if isinstance(attributes, dict) else None
    if isinstance(turn, (int, float)) and turn % 180:
        raise ValueError(f"the box is rotated by {turn:g} degrees, but bbox is not")


def _facts(found: SizedImage, objects: Sequence[GroundTruthObject], categories: dict[Id, str]) -> dict[str, Any]:
    known = [
        {
            "category_id": one.category,
            "label": categories[one.category],
            "box": xywh_to_xyxy(one.box),
            "area": one.area,
            "crowd": one.crowd,
        }
        for one in objects
    ]
    return {"image_id": found.id, "width": found.width, "height": found.height, "objects": known}


# COCO objects → boxes as location tokens and in pixels.


@dataclass(frozen=True, slots=True)
class SizedImage:
    """An image with name, width and height."""

    id: Id
    name: str
    width: int
    height: int


def parse_sized_image(record: dict[str, Any]) -> tuple[Id, SizedImage]:
    """Parse an image record.

    Raises:
        ValueError: the record is invalid.
    """
    found = parse_image(record)
    if not found.file_name or not found.width or not found.height or min(found.width, found.height) < 1:
        raise ValueError("must have file_name, width and height")
    name = found.file_name.replace("\\", "/")  # as Windows writes them
    return found.id, SizedImage(found.id, name, found.width, found.height)


def outside_image_error(box: Box, image: SizedImage) -> str:
    """Return an error if a box exceeds its image by more than rounding, else ""."""
    if not exceeds_image(xywh_to_xyxy(box), image.width, image.height):
        return ""
    shown = ", ".join(f"{edge:g}" for edge in box)
    return f"field bbox: x, y, width, height [{shown}] exceed the image of {image.width} × {image.height} pixels"


def format_location_tokens(objects: Sequence[GroundTruthObject], image: SizedImage, labels: Mapping[Id, str]) -> str:
    """Return objects as location tokens.

    Args:
        labels: category ID → label; empty for boxes without labels.

    Raises:
        ValueError: a label that is not allowed with location tokens.
    """
    return location_tokens.format_objects([_located(one, image, labels.get(one.category, "")) for one in objects])


def is_visible(one: GroundTruthObject, image: SizedImage) -> bool:
    """Whether an object is at least partly inside the image."""
    left, top, right, bottom = xywh_to_xyxy(one.box)
    return max(left, 0) < min(right, image.width) and max(top, 0) < min(bottom, image.height)


def _located(one: GroundTruthObject, image: SizedImage, label: str) -> LocatedObject:
    left, top, right, bottom = xywh_to_xyxy(one.box)
    return LocatedObject(location_tokens.to_fractions((left, top, right, bottom), image.width, image.height), label)


# COCO's object detection: instances and result files.
#
# Release: `{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations": [{"id",
# "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}]}`. Results: `[{"image_id", "category_id",
# "bbox", "score"}]`, or with `segmentation`. `bbox` is x, y, width, height in pixels. IDs may be texts, and are
# compared as text. Images and categories need only IDs, annotations only `image_id`, `category_id` and `bbox`. Source:
# cocodataset.org, "Data format" and "Results format".

_NUMBER: tuple[type, ...] = (int, float)
ID: tuple[type, ...] = (int, str)
_DETECTION_ANNOTATION: Types = {"image_id": ID, "category_id": ID, "bbox": list}
_OPTIONAL: Types = {"id": ID, "area": _NUMBER}
_RESULT: Types = {"image_id": ID, "category_id": ID, "score": _NUMBER}
_REMEDY = "Fix the file; nothing was scored."
_SOME, _ALMOST_ALL = 0.1, 0.95

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of the release; missing fields are None."""

    id: Id
    file_name: str | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class CocoInstances:
    """A split of the release.

    Attributes:
        images: image ID → image, with or without objects.
        categories: category ID → name.
        objects: in the order of the file.
        outlines: the field `segmentation` of each object, unchanged, or None.
    """

    images: dict[Id, CocoImage]
    categories: dict[Id, str]
    objects: list[GroundTruthObject]
    outlines: list[Any]


def read_instances(path: Path) -> CocoInstances:
    """Read a split of the release.

    Raises:
        UserError: the file is malformed, IDs are not unique, or annotations refer to unknown images or categories.
    """
    content = read_json_file(path)
    names = ("images", "categories", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        raise UserError(f"{path}: not a COCO instances file: it needs lists of images, categories and annotations")
    checked = {}
    for name, what in zip(names, ("image", "category record", "annotation"), strict=True):
        if what == "annotation":
            check_records(path, content[name], _DETECTION_ANNOTATION, what, _OPTIONAL)
        else:
            check_records(path, content[name], {"id": ID}, what)
        checked[name] = index_by_id(path, [one for one in content[name] if "id" in one], "id")
    images = {key: _image(path, record) for key, record in checked["images"].items()}
    categories = {key: str(record.get("name", key)) for key, record in checked["categories"].items()}
    records = content["annotations"]
    _resolve(path, records, images, categories)
    found = _parse_each(path, records, lambda record, number: parse_object(record, number), "annotation")
    return CocoInstances(images, categories, found, [record.get("segmentation") or None for record in records])


def read_results(path: Path, instances: CocoInstances) -> list[Detection]:
    """Read a result file. Images without detections are allowed, and so is an empty list.

    Areas are those of the boxes if there are any, else of the masks, as in pycocotools.

    Raises:
        UserError: the file is malformed, or has unknown images or categories.
    """
    records = read_records(path, _RESULT, may_be_empty=True)
    if not records:
        return []
    _resolve(path, records, instances.images, instances.categories)
    fields = [name for name in ("bbox", "segmentation") if records[0].get(name)] or ["bbox"]

    def parse(record: dict[str, Any], number: int) -> Detection:
        if strange := [name for name in ("bbox", "segmentation") if bool(record.get(name)) != (name in fields)]:
            raise ValueError(f"field {strange[0]}: must be in all records or in none")
        require_fields(record, {"bbox": list} if "bbox" in fields else {})
        if not math.isfinite(record["score"]):
            raise ValueError(f"field score: must be a finite number, got {record['score']}")
        image = instances.images[record["image_id"]]
        mask = _mask(record["segmentation"], image) if "segmentation" in fields else None
        box = parse_box(record["bbox"]) if "bbox" in fields or mask is None else box_around(mask)
        size = float(mask.area) if mask is not None and "bbox" not in fields else None
        return Detection(image.id, record["category_id"], box, float(record["score"]), size, mask)

    return _parse_each(path, records, parse, "record")


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return COCO's average precision and recall of boxes, and of masks if the results have them.

    Args:
        references: the split's instances file.

    Raises:
        UserError: malformed files, results of another split, boxes that are not x, y, width, height in pixels.
    """
    if len(references) != 1:
        raise UserError(f"detect needs one reference file, the instances of the split; got {len(references)}")
    (path,) = references
    instances = read_instances(path)
    found = read_results(predictions, instances)
    _require_pixels(path, instances.objects, instances.images)
    _require_pixels(predictions, found, instances.images)
    notes = {}
    if found and found[0].mask is not None:
        if without := instances.outlines.count(None):
            notes["mask AP"] = f"{without} of {len(instances.objects)} annotations have no segmentation"
        else:
            instances = _with_masks(path, instances)
    measured = coco_ap.average_precision(list(instances.images), instances.objects, found)
    return replace(measured, notes=notes)


def xywh_to_xyxy(box: Box) -> list[float]:
    """Convert x, y, width, height to x_min, y_min, x_max, y_max."""
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def require_pixels(path: Path, placed: Iterable[tuple[Box, int, int]]) -> None:
    """Check that boxes are x, y, width, height in pixels.

    They are considered x_min, y_min, x_max, y_max if at least a tenth of them exceed their images as x, y, width,
    height, and at least 95 % are inside as corners. They are considered fractions if none exceeds the first pixel.

    Args:
        placed: box, width and height of its image in pixels.

    Raises:
        UserError: the boxes have another format.
    """
    total = beyond = inside = tiny = 0
    for box, width, height in placed:
        total += 1
        beyond += exceeds_image(xywh_to_xyxy(box), width, height)
        inside += box[0] < box[2] and box[1] < box[3] and not exceeds_image(box, width, height)
        tiny += 0 < max(box) <= 1 < min(width, height)
    if beyond and beyond >= _SOME * total and inside >= _ALMOST_ALL * total:
        problem = (
            f"{path}: bbox is not x, y, width, height: {beyond:,} of {total:,} boxes would exceed their images, but "
        )
        problem += f"as x_min, y_min, x_max, y_max {inside:,} are inside"
        raise UserError(problem, "Write x_max - x_min and y_max - y_min instead of x_max and y_max.")
    if total and tiny == total:
        problem = f"{path}: bbox is not in pixels: no number of its {total:,} boxes is larger than 1"
        raise UserError(problem, "Multiply x and width by the image's width, y and height by its height.")


def _require_pixels(
    path: Path, placed: Iterable[GroundTruthObject | Detection], images: Mapping[Id, CocoImage]
) -> None:
    """As `require_pixels`, for images of known size."""
    with_pictures = ((one.box, images[one.image]) for one in placed)
    require_pixels(path, ((box, of.width, of.height) for box, of in with_pictures if of.width and of.height))


def _with_masks(path: Path, instances: CocoInstances) -> CocoInstances:
    pairs = list(zip(instances.objects, instances.outlines, strict=True))

    def parse(pair: tuple[GroundTruthObject, Any], number: int) -> GroundTruthObject:
        one, outline = pair
        return replace(one, mask=_mask(outline, instances.images[one.image]))

    return replace(instances, objects=_parse_each(path, pairs, parse, "annotation"))


def _mask(outline: Any, image: CocoImage) -> Mask:
    return read_segmentation(outline, image.height, image.width)


def _parse_each(path: Path, records: Sequence[Any], parse: Callable[[Any, int], Parsed], what: str) -> list[Parsed]:
    """Parse all records.

    Raises:
        UserError: lists the first 20 invalid records.
    """
    found, faults = [], []
    for number, record in enumerate(records, 1):
        try:
            found.append(parse(record, number))
        except ValueError as error:
            faults.append(f"{path}: {what} {number}: {error}")
    raise_all(faults, _REMEDY)
    return found


def parse_image(record: dict[str, Any]) -> CocoImage:
    """Parse an image record of the release.

    Raises:
        ValueError: the record is invalid.
    """
    require_fields(record, {"id": ID})
    name, width, height = (record.get(field) for field in ("file_name", "width", "height"))
    if not isinstance(name, (str, type(None))) or not all(isinstance(n, (int, type(None))) for n in (width, height)):
        raise ValueError("file_name must be text, width and height whole numbers")
    return CocoImage(record["id"], name, width, height)


def parse_object(record: dict[str, Any], otherwise: Id) -> GroundTruthObject:
    """Parse an annotation of the release. Without `area`, the area of its box is used.

    Args:
        otherwise: the ID if it has none.

    Raises:
        ValueError: the annotation is invalid; the message starts with its ID, if it has one.
    """
    try:
        return _object(record, otherwise)
    except ValueError as error:
        known = record.get("id")
        raise ValueError(f"annotation {known}: {error}" if isinstance(known, ID) else str(error)) from None


def _resolve(path: Path, records: Sequence[dict[str, Any]], images: Collection[Id], categories: Collection[Id]) -> None:
    """Replace IDs by the release's IDs with the same text.

    Raises:
        UserError: unknown IDs.
    """
    problems = []
    for field, known in (("image_id", images), ("category_id", categories)):
        ids = {record[field] for record in records}
        here = match_ids(ids, known)
        if unknown := ids - here.keys():
            told = f"{len(unknown)} {field}s that are not in the references: {format_ids(unknown)}"
            problems.append(f"{path}: {told}{types_note(unknown, known)}")
            continue
        for record in records:
            record[field] = here[record[field]]
    if problems:
        raise UserError("\n".join(problems), "Results and references must be of the same split.")


def _image(path: Path, record: dict[str, Any]) -> CocoImage:
    try:
        return parse_image(record)
    except ValueError as error:
        raise UserError(f"{path}: image {record['id']}: {error}") from None


def _object(record: dict[str, Any], otherwise: Id) -> GroundTruthObject:
    require_fields(record, _DETECTION_ANNOTATION, _OPTIONAL)
    box = parse_box(record["bbox"])
    area, crowd = record.get("area", box[2] * box[3]), record.get("iscrowd", 0)
    if not (math.isfinite(area) and area >= 0):
        raise ValueError(f"field area: must be a non-negative number, got {area}")
    if crowd not in (0, 1):
        raise ValueError(f"field iscrowd: 0 or 1 expected, found {crowd!r}"[:200])
    return GroundTruthObject(
        record.get("id", otherwise), record["image_id"], record["category_id"], box, float(area), bool(crowd)
    )


def parse_box(numbers: list[Any]) -> Box:
    """Return x, y, width, height.

    Raises:
        ValueError: `numbers` is not a box.
    """
    right = len(numbers) == 4 and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if not right or numbers[2] < 0 or numbers[3] < 0:
        raise ValueError(f"field bbox: must be four numbers x, y, width, height, got {numbers}"[:200])
    x, y, width, height = map(float, numbers)
    return x, y, width, height
