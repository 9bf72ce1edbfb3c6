"""COCO captions: release files, result files, Karpathy's split file.

Release: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "id", "caption"}]}`, as TextCaps, VizWiz and
nocaps have it, too. Results: `[{"image_id", "caption"}]`. Karpathy's `dataset_coco.json`: `{"images": [{"cocoid",
"filepath", "filename", "split", "sentences": [{"raw"}]}]}`. Sources: cocodataset.org/#format-data, Karpathy and Fei-Fei
2015, "Deep Visual-Semantic Alignments for Generating Image Descriptions".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.official.results import (
    Types,
    by_id,
    check_records,
    name_ids,
    read_json_file,
    read_records,
    require_same_ids,
)
from ftlib.errors import UserError
from ftlib.metrics.captions import measure
from ftlib.metrics.totals import Measured

Id = int | str
_ID: tuple[type, ...] = (int, str)
IMAGE: Types = {"id": _ID, "file_name": str}
CAPTION: Types = {"id": _ID, "image_id": _ID, "caption": str}
_RESULT: Types = {"image_id": _ID, "caption": str}
KARPATHY_IMAGE: Types = {"cocoid": _ID, "filepath": str, "filename": str, "split": str, "sentences": list}


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image with what people wrote about it.

    Attributes:
        file_name: the release's own name; in Karpathy's file with its folder (`val2014/….jpg`).
        captions: as written, at least one.
    """

    image_id: Id
    file_name: str
    captions: tuple[str, ...]


def read_captions(path: Path) -> list[CaptionedImage]:
    """Read a release file; images in its order.

    Raises:
        UserError: the file is malformed, ids occur twice, or images and captions do not belong together.
    """
    content = read_json_file(path)
    images = by_id(path, _listed(path, content, "images", IMAGE, "image"), "id")
    annotations = _listed(path, content, "annotations", CAPTION, "annotation")
    by_id(path, annotations, "id")
    captions: dict[Id, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    if unknown := captions.keys() - images.keys():
        raise UserError(f"{path}: captions of {len(unknown)} images that it does not list: {name_ids(unknown)}")
    if bare := images.keys() - captions.keys():
        raise UserError(f"{path}: {len(bare)} images have no caption: {name_ids(bare)}")
    return [CaptionedImage(key, image["file_name"], tuple(captions[key])) for key, image in images.items()]


def read_karpathy_splits(path: Path) -> dict[str, list[CaptionedImage]]:
    """Read Karpathy's split file: `train`, `restval` (usually trained on, too), `val`, `test` → images in its order.

    Raises:
        UserError: the file is malformed, ids occur twice, or an image has no caption.
    """
    found: dict[str, list[CaptionedImage]] = {}
    images = by_id(path, _listed(path, read_json_file(path), "images", KARPATHY_IMAGE, "image"), "cocoid")
    for key, image in images.items():
        check_records(path, image["sentences"], {"raw": str}, f"image {key}: sentence")
        captions = tuple(sentence["raw"] for sentence in image["sentences"])
        name = f"{image['filepath']}/{image['filename']}"
        found.setdefault(image["split"], []).append(CaptionedImage(key, name, captions))
    return found


def read_results(path: Path) -> dict[Id, str]:
    """Read a result file: image id → caption.

    Raises:
        UserError: the file is malformed, or image ids occur twice.
    """
    records = by_id(path, read_records(path, _RESULT), "image_id")
    return {key: record["caption"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """Caption scores of a result file. The official script judges the images of the result file, however few; here
    every image of the release file needs a caption.

    Args:
        references: the release file of the split.

    Raises:
        UserError: malformed files, or not the same images in both.
    """
    if len(references) != 1:
        raise UserError(f"caption needs one reference file, the captions of the split; got {len(references)}")
    images = {image.image_id: image.captions for image in read_captions(references[0])}
    captions = read_results(predictions)
    require_same_ids(predictions, captions, images, "image_id")
    return measure(images, captions)


def _listed(path: Path, content: Any, name: str, types: Types, what: str) -> list[dict[str, Any]]:
    """The checked records of one list of a release file."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise UserError(f"{path}: an object with a list `{name}` is needed")
    records: list[dict[str, Any]] = content[name]
    check_records(path, records, types, what)
    return records
