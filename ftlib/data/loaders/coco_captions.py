"""COCO captions of 2014 or 2017, or Karpathy's split of them → rows.

Files below `data.root`, with or without their zips' folders: `dataset_coco.json` (Karpathy's; taken where it is there),
else `captions_{train,val}2014.json` or `captions_{train,val}2017.json`; images in `train2014/`, `val2014/`,
`train2017/`, `val2017/`. `data.file` chooses by the name of a file. Karpathy's `restval` belongs to train.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.layout import Part, Variant, choose, folder_of, picture
from ftlib.data.loaders.rows import Kept, Numbered, Reading, collect, fault, needed
from ftlib.data.official.captions import CAPTION, IMAGE, KARPATHY_IMAGE
from ftlib.data.official.results import require_fields
from ftlib.data.official.streaming import stream_lists

_YEARS: list[Variant] = [
    {"train": f"captions_train{year}.json", "valid": f"captions_val{year}.json"} for year in (2014, 2017)
]
_KARPATHY: list[Variant] = [{"": "dataset_coco.json"}]
_RANKS = [_KARPATHY, _YEARS]
_KARPATHY_PARTS: dict[str, Part] = {"train": "train", "restval": "train", "val": "valid", "test": "test"}


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: none is there, or those of several releases.
    """
    return list(choose(data, _RANKS).values())


def examples(data: Data) -> Iterator[Example | Bad]:
    """Part train: a row for each caption. The others: a row for each image, whose references are all its captions.

    Raises:
        UserError: missing files, files of both years, files that are no such JSON.
    """
    root, reading = Path(data.root), Reading()
    for part, path in choose(data, _RANKS).items():
        if part:
            yield from _release(reading, part, path, folder_of(root, path.stem.removeprefix("captions_")))
        else:
            yield from _karpathy(reading, path, root)


def _release(reading: Reading, part: Part, path: Path, folder: str) -> Iterator[Example | Bad]:
    images = Kept("image", _image)
    captions = Kept("annotation", _caption)
    yield from collect(path, {"images": images, "annotations": captions})
    by_image: dict[Any, list[tuple[str, str]]] = {key: [] for key in images.found}
    for key, (image, text) in captions.found.items():
        if image in by_image:
            by_image[image].append((f"{image}-{key}", text))
        else:
            yield fault(f"{path}: annotation of id {str(key)[:50]}", f"field image_id: there is no image {image!r}")

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        return _rows(part, record["id"], picture(folder, images.found[record["id"]]), by_image[record["id"]])

    records = ({"id": key} for key in by_image)
    yield from reading.rows(Numbered(path, "image"), enumerate(records, 1), parse)


def _karpathy(reading: Reading, path: Path, root: Path) -> Iterator[Example | Bad]:
    folders = {name: folder_of(root, name) for name in ("train2014", "val2014")}

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        require_fields(record, KARPATHY_IMAGE)
        key, folder, split = record["cocoid"], record["filepath"], record["split"]
        if split not in _KARPATHY_PARTS:
            raise ValueError(f"field split: one of {', '.join(_KARPATHY_PARTS)} expected, found {split!r}"[:200])
        captions = [(f"{key}-{n}", _raw(sentence)) for n, sentence in enumerate(record["sentences"], 1)]
        return _rows(_KARPATHY_PARTS[split], key, picture(folders.get(folder, folder), record["filename"]), captions)

    records = ((number, record) for _, number, record in stream_lists(path, ["images"]))
    yield from reading.rows(Numbered(path, "image"), records, parse)


def _rows(part: Part, key: Any, image: str, captions: list[tuple[str, str]]) -> list[Example]:
    """Captions of an image → rows; in evaluation the image's own id is the row's."""
    texts = [needed(text, "caption") for _, text in captions]
    if not texts:
        raise ValueError(f"image {key}: no caption of it")
    facts = {"image_id": key}
    if part == "train":
        return [
            Example(name, image, "", text, facts=facts, part=part)
            for (name, _), text in zip(captions, texts, strict=True)
        ]
    return [Example(str(key), image, "", texts[0], texts, facts, part)]


def _image(record: dict[str, Any]) -> tuple[Any, str]:
    require_fields(record, IMAGE)
    return record["id"], record["file_name"]


def _caption(record: dict[str, Any]) -> tuple[Any, tuple[Any, str]]:
    require_fields(record, CAPTION)
    return record["id"], (record["image_id"], record["caption"])


def _raw(sentence: Any) -> str:
    if not isinstance(sentence, dict):
        raise ValueError("field sentences: objects expected")
    require_fields(sentence, {"raw": str})
    text: str = sentence["raw"]
    return text
