"""RefCOCO, RefCOCO+ and RefCOCOg → rows, a referring expression → the box of what it means.

Below `data.root`, with or without a folder named as the source (`refcoco/`, `refcoco+/`, `refcocog/`): `instances.json`
and `refs(unc).p` (`refs(umd).p` of RefCOCOg; `data.file` chooses another, such as refs(google).p); images in
`train2014/` or `images/mscoco/images/train2014/`. Source: github.com/lichengunc/refer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.boxes import SizedPicture, an_object, corners, sized_picture, to_text, visible
from ftlib.data.loaders.layout import Part, find, folder_of, picture
from ftlib.data.loaders.rows import Kept, Numbered, Parse, Reading, collect
from ftlib.data.official.plain_pickle import read_plain_pickle
from ftlib.data.official.segmentation import read_mask, write_mask
from ftlib.errors import UserError
from ftlib.metrics.boxes import Object

_PARTS: dict[Any, Part] = {"train": "train", "val": "valid", "test": "test", "testA": "test", "testB": "test"}
_IMAGES = ("train2014", "images/mscoco/images/train2014", "mscoco/images/train2014", "images/train2014")
_FIELDS = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentence": dict}
_MOST = 1 << 63
LEAKED = "expressions of part train about images that occur in valid or test"


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads: the pickle of expressions and the instances beside it.

    Raises:
        UserError: the pickle is missing.
    """
    root = Path(data.root)
    name = data.file or ("refs(umd).p" if data.source == "refcocog" else "refs(unc).p")
    own = root / data.source
    refs = find(own if own.is_dir() else root, name) or find(root, name)
    if refs is None:
        raise UserError(f"{root}: {name} lies neither there nor in {data.source}/", "Check data.root and data.file.")
    return [refs, refs.with_name("instances.json")]


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each expression. Of part train, those about images that occur in valid or test are left out.

    Raises:
        UserError: missing files, a pickle that is damaged or holds more than plain data, files that are no such JSON.
    """
    return _read(data, Counter())


def segment(data: Data) -> Iterator[Example | Bad]:
    """As `examples`; facts has the object's `mask` too, of the release's polygons or run lengths.

    Raises:
        UserError: as `examples`.
    """
    return _read(data, Counter(), outlines={})


def left_out(data: Data) -> dict[str, int]:
    """What `examples` leaves out: reason → how many. Reads the whole source once more.

    Raises:
        UserError: as `examples`.
    """
    counts = Counter({LEAKED: 0})
    for _ in _read(data, counts):
        pass
    return dict(counts)


def _read(data: Data, counts: Counter[str], outlines: dict[int, str] | None = None) -> Iterator[Example | Bad]:
    """
    Args:
        outlines: where the objects' masks are kept, if they are wanted: id → the field segmentation, as JSON.
    """
    path, instances = files(data)

    def parse_object(record: dict[str, Any]) -> tuple[int, Object]:
        key, one = an_object(record)
        if outlines is not None:
            outlines[key] = json.dumps(record.get("segmentation"))
        return key, one

    pictures, objects = Kept("image", sized_picture), Kept("annotation", parse_object)
    refs = read_plain_pickle(path)
    if not isinstance(refs, list) or not refs:
        raise UserError(f"{path}: a list of referring expressions is needed")
    yield from collect(instances, {"images": pictures, "annotations": objects})
    asked = {_get(ref, "image_id") for ref in refs if _PARTS.get(_get(ref, "split"), "train") != "train"}
    folder = folder_of(Path(data.root), *_IMAGES)
    parse = _parser(folder, pictures.found, objects.found, asked, counts, outlines)
    yield from Reading().rows(Numbered(path, "ref"), _sentences(refs), parse)


def _get(ref: Any, name: str) -> int | str | None:
    """A simple field of a record, if it is one."""
    value = ref.get(name) if isinstance(ref, dict) else None
    return value if isinstance(value, (int, str)) else None


def _sentences(refs: list[Any]) -> Iterator[tuple[int, Any]]:
    """(number of the ref, the ref with one of its sentences)."""
    for number, ref in enumerate(refs, 1):
        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        if isinstance(sentences, list) and sentences:
            yield from ((number, {**ref, "sentence": sentence}) for sentence in sentences)
        else:
            yield number, ref


def _parser(
    folder: str,
    pictures: dict[int, SizedPicture],
    objects: dict[int, Object],
    asked: set[int | str | None],
    counts: Counter[str],
    outlines: dict[int, str] | None,
) -> Parse:
    """A ref with one of its sentences → row.

    Args:
        asked: ids of the images of parts valid and test.
    """

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        key, expression = _sentence(record)
        found, shown = objects.get(record["ann_id"]), pictures.get(record["image_id"])
        if found is None or shown is None or found.image != shown.id:
            raise ValueError("field ann_id or image_id: instances.json has no such object in such an image")
        if not visible(found, shown):
            raise ValueError("its box has no extent inside the image")
        part = _PARTS[record["split"]]
        if part == "train" and shown.id in asked:
            counts[LEAKED] += 1
            return []
        facts = {name: record[name] for name in ("ref_id", "ann_id", "image_id", "split")}
        facts |= {"box": corners(found.box), "width": shown.width, "height": shown.height}
        if outlines is not None:
            facts["mask"] = _mask(outlines[found.id], shown)
        suffix = to_text([found], shown, {})
        return [Example(str(key), picture(folder, shown.name), expression, suffix, facts=facts, part=part)]

    return parse


def _mask(outline: str, shown: SizedPicture) -> dict[str, Any]:
    """
    Raises:
        ValueError: neither polygons nor run lengths of the image's size.
    """
    value = json.loads(outline)
    form = {"polygons": value} if isinstance(value, list) else {"counts": (value or {}).get("counts")}
    try:
        return write_mask(read_mask({"size": [shown.height, shown.width], **form}))
    except ValueError as error:
        raise ValueError(f"field segmentation: {error}") from None


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a type, and no number that is too long to be written."""
    return type(value) is kind and not (isinstance(value, int) and abs(value) >= _MOST)


def _sentence(record: dict[str, Any]) -> tuple[int, str]:
    """The id and the text of a sentence, once all fields are what they should be.

    No value is shown: what a pickle holds may be too long to write out.
    """
    for name, kind in _FIELDS.items():
        if not _is(record.get(name), kind):
            raise ValueError(f"field {name}: {kind.__name__} expected")
    if record["split"] not in _PARTS:
        raise ValueError(f"field split: one of {', '.join(_PARTS)} expected")
    key, expression = record["sentence"].get("sent_id"), record["sentence"].get("sent")
    if not _is(key, int) or not isinstance(expression, str) or not expression.strip():
        raise ValueError("field sentences: objects with a number `sent_id` and a text `sent` expected")
    if any("\ud800" <= character <= "\udfff" for character in expression):
        raise ValueError("field sentences: a text that is not UTF-8")
    return key, expression.strip()
