"""COCO captions of 2014 or 2017, Karpathy's splits, or captions in the same format.

Files in `data.root`, with or without the folders of the zips: `dataset_coco.json` (Karpathy's; preferred), else
`captions_{train,val}2014.json` or `captions_{train,val}2017.json`; images in `train2014/`, `val2014/`, `train2017/`,
`val2017/`. `data.file` selects a release by one of its files. Karpathy's `restval` belongs to train. For other file
names see `coco_files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import (
    JsonTable,
    NumberedFile,
    RowReader,
    invalid,
    read_tables,
    require_text,
    unused_fields,
)
from ftlib.data.sources.coco_files import find_files, image_folder, is_official, part_name
from ftlib.data.sources.json_stream import stream_lists
from ftlib.data.sources.records import (
    Types,
    align_predictions,
    check_records,
    format_ids,
    index_by_id,
    match_ids,
    read_json_file,
    read_records,
    require_fields,
    shown_id,
)
from ftlib.data.sources.release_files import OfficialSplit, ReleaseFiles, image_dir, image_name
from ftlib.errors import UserError
from ftlib.metrics.base import MetricResult
from ftlib.metrics.captions import measure

_PREFIX = "captions_"
_YEARS: list[ReleaseFiles] = [
    {"train": f"{_PREFIX}train{year}.json", "valid": f"{_PREFIX}val{year}.json"} for year in (2014, 2017)
]
_KARPATHY: list[ReleaseFiles] = [{"": "dataset_coco.json"}]
_RANKS = [_KARPATHY, _YEARS]
_KARPATHY_PARTS: dict[str, OfficialSplit] = {"train": "train", "restval": "train", "val": "valid", "test": "test"}


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads.

    Raises:
        UserError: there are none, or files of several releases.
    """
    return list(find_files(data, _RANKS, _PREFIX).values())


@register_source(name="coco_captions")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each caption in train (or without splits), else a row for each image with all captions.

    Raises:
        UserError: missing files, files of both years, files that are not such JSON.
    """
    root, reading = Path(data.root), RowReader()
    found = find_files(data, _RANKS, _PREFIX)
    for part, path in found.items():
        if not part and _is_karpathys(path):
            yield from _karpathy(reading, path, root)
        else:
            # tools number the images of each split from the same start
            before = f"{part}-" if len(found) > 1 and not is_official(path, _RANKS) else ""
            yield from _release(reading, part, path, root, before)


def _is_karpathys(path: Path) -> bool:
    return any(
        "cocoid" in record for _, _, record in islice(stream_lists(path, ["images"]), 1) if isinstance(record, dict)
    )


def _release(
    reading: RowReader, part: OfficialSplit, path: Path, root: Path, before: str
) -> Iterator[Example | InvalidRecord]:
    """
    Args:
        before: prefix of the rows' IDs.
    """
    images = JsonTable("image", _image, IMAGE)
    captions: JsonTable[tuple[Any, str]] = JsonTable(
        "annotation", lambda record: _caption(record, len(captions.values)), ("id", *CAPTION)
    )
    lists: dict[str, JsonTable[Any]] = {"images": images, "annotations": captions}
    yield from read_tables(path, lists)
    unused = unused_fields(lists)
    folder = image_folder(root, path, _PREFIX, list(images.values.values()))
    own = match_ids({image for image, _ in captions.values.values()}, images.values)
    by_image: dict[Any, list[tuple[str, str]]] = {key: [] for key in images.values}
    for key, (image, text) in captions.values.items():
        if image in own:
            by_image[own[image]].append((f"{before}{image}-{key}", text))
        else:
            yield invalid(f"{path}: annotation of id {shown_id(key)}", f"field image_id: no such image: {image!r}")

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        key = record["id"]
        rows = _rows(part, key, image_name(folder, images.values[key]), by_image[key], before)
        return [replace(row, part_name=part_name(path, _PREFIX) if part else "", unused=unused) for row in rows]

    records = zip(images.numbers, ({"id": key} for key in by_image), strict=True)
    yield from reading.rows(NumberedFile(path, "image"), records, parse)


def _karpathy(reading: RowReader, path: Path, root: Path) -> Iterator[Example | InvalidRecord]:
    folders = {name: image_dir(root, name) for name in ("train2014", "val2014")}

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        require_fields(record, KARPATHY_IMAGE)
        key, folder, split = record["cocoid"], record["filepath"], record["split"]
        if split not in _KARPATHY_PARTS:
            raise ValueError(f"field split: one of {', '.join(_KARPATHY_PARTS)} expected, found {split!r}"[:200])
        captions = [(f"{key}-{n}", _raw_text(sentence)) for n, sentence in enumerate(record["sentences"], 1)]
        rows = _rows(_KARPATHY_PARTS[split], key, image_name(folders.get(folder, folder), record["filename"]), captions)
        return [replace(row, part_name=split) for row in rows]

    records = ((number, record) for _, number, record in stream_lists(path, ["images"]))
    yield from reading.rows(NumberedFile(path, "image"), records, parse)


def _rows(
    part: OfficialSplit, key: Any, image: str, captions: list[tuple[str, str]], before: str = ""
) -> list[Example]:
    """Return the rows of an image's captions; in evaluation splits, the row has the ID of the image."""
    texts = [require_text(text, "caption") for _, text in captions]
    if not texts:
        raise ValueError(f"image {key}: no caption of it")
    facts = {"image_id": key}
    if part in ("train", ""):
        return [
            Example(name, image, "", text, facts=facts, part=part)
            for (name, _), text in zip(captions, texts, strict=True)
        ]
    stripped = [text.strip() for text in texts]
    return [Example(f"{before}{key}", image, "", texts[0], stripped, facts, part)]


def _image(record: dict[str, Any]) -> tuple[Any, str]:
    require_fields(record, IMAGE)
    return record["id"], record["file_name"].replace("\\", "/")


def _caption(record: dict[str, Any], number: int) -> tuple[Any, tuple[Any, str]]:
    """
    Args:
        number: used as ID if the caption has none.
    """
    require_fields(record, CAPTION, {"id": ID})
    return record.get("id", f"without id, number {number}"), (record["image_id"], record["caption"])


def _raw_text(sentence: Any) -> str:
    if not isinstance(sentence, dict):
        raise ValueError("field sentences: objects expected")
    require_fields(sentence, {"raw": str})
    text: str = sentence["raw"]
    return text


# COCO captions: release files, result files, Karpathy's split file.
#
# Release: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "id", "caption"}]}`, as TextCaps, VizWiz and
# nocaps have it, too. Results: `[{"image_id", "caption"}]`. Karpathy's `dataset_coco.json`: `{"images": [{"cocoid",
# "filepath", "filename", "split", "sentences": [{"raw"}]}]}`. Sources: cocodataset.org/#format-data, Karpathy and
# Fei-Fei 2015, "Deep Visual-Semantic Alignments for Generating Image Descriptions".

Id = int | str
ID: tuple[type, ...] = (int, str)
IMAGE: Types = {"id": ID, "file_name": str}
CAPTION: Types = {"image_id": ID, "caption": str}
_RESULT: Types = {"image_id": ID, "caption": str}
KARPATHY_IMAGE: Types = {"cocoid": ID, "filepath": str, "filename": str, "split": str, "sentences": list}


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image with its captions.

    Attributes:
        file_name: the release's file name, if it has one; in Karpathy's file with its folder (`val2014/….jpg`).
        captions: unchanged, at least one.
    """

    image_id: Id
    file_name: str | None
    captions: tuple[str, ...]


def read_captions(path: Path) -> list[CaptionedImage]:
    """Read a release file; images keep their order.

    Raises:
        UserError: the file is malformed, IDs are not unique, or captions refer to unknown images.
    """
    content = read_json_file(path)
    images = index_by_id(path, _listed(path, content, "images", {"id": ID}, "image", {"file_name": str}), "id")
    annotations = _listed(path, content, "annotations", CAPTION, "annotation", {"id": ID})
    index_by_id(path, [one for one in annotations if "id" in one], "id")
    own = match_ids({annotation["image_id"] for annotation in annotations}, images)
    captions: dict[Id, list[str]] = {}
    for annotation in annotations:
        key = annotation["image_id"]
        captions.setdefault(own.get(key, key), []).append(annotation["caption"])
    if unknown := captions.keys() - images.keys():
        raise UserError(f"{path}: captions of {len(unknown)} images that it does not list: {format_ids(unknown)}")
    if bare := images.keys() - captions.keys():
        raise UserError(f"{path}: {len(bare)} images have no caption: {format_ids(bare)}")
    return [CaptionedImage(key, image.get("file_name"), tuple(captions[key])) for key, image in images.items()]


def read_karpathy_splits(path: Path) -> dict[str, list[CaptionedImage]]:
    """Read Karpathy's split file: `train`, `restval` (usually part of train), `val`, `test` → images in order.

    Raises:
        UserError: the file is malformed, IDs are not unique, or an image has no caption.
    """
    found: dict[str, list[CaptionedImage]] = {}
    images = index_by_id(path, _listed(path, read_json_file(path), "images", KARPATHY_IMAGE, "image"), "cocoid")
    for key, image in images.items():
        check_records(path, image["sentences"], {"raw": str}, f"image {key}: sentence")
        captions = tuple(sentence["raw"] for sentence in image["sentences"])
        name = f"{image['filepath']}/{image['filename']}"
        found.setdefault(image["split"], []).append(CaptionedImage(key, name, captions))
    return found


def read_results(path: Path) -> dict[Id, str]:
    """Read a result file: image id → caption.

    Raises:
        UserError: the file is malformed, or image IDs are not unique.
    """
    records = index_by_id(path, read_records(path, _RESULT), "image_id")
    return {key: record["caption"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return caption scores of a result file. The official script scores only the images of the result file; here
    every image of the release file needs a caption.

    Args:
        references: the release file of the split.

    Raises:
        UserError: malformed files, or different images in both.
    """
    if len(references) != 1:
        raise UserError(f"caption needs one reference file, the captions of the split; got {len(references)}")
    images = {image.image_id: image.captions for image in read_captions(references[0])}
    captions = align_predictions(predictions, read_results(predictions), images, "image_id")
    return replace(measure(images, captions), answers=[{"prediction": text} for text in captions.values()])


def _listed(
    path: Path, content: Any, name: str, types: Types, what: str, optional: Types | None = None
) -> list[dict[str, Any]]:
    """Return the validated records of a list of a release file."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise UserError(f"{path}: must be an object with a list `{name}`")
    records: list[dict[str, Any]] = content[name]
    check_records(path, records, types, what, optional)
    return records
