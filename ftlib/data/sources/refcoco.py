"""RefCOCO, RefCOCO+ and RefCOCOg → rows, a referring expression → the box of what it means.

Below `data.root`, with or without a folder named as the source (`refcoco/`, `refcoco+/`, `refcocog/`): `instances.json`
and `refs(unc).p` (`refs(umd).p` of RefCOCOg; `data.file` chooses another, such as refs(google).p); images in
`train2014/` or `images/mscoco/images/train2014/`. Source: github.com/lichengunc/refer.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import JsonTable, NumberedFile, RowParser, RowReader, read_tables
from ftlib.data.sources.coco_detection import (
    SizedImage,
    format_location_tokens,
    is_visible,
    outside_image_error,
    parse_object,
    parse_sized_image,
    require_pixels,
    xywh_to_xyxy,
)
from ftlib.data.sources.records import require_fields
from ftlib.data.sources.release_files import OfficialSplit, find, image_dir, image_name
from ftlib.errors import UserError
from ftlib.metrics.coco_ap import GroundTruthObject, Id
from ftlib.metrics.segmentation import read_segmentation, write_mask

_PARTS: dict[Any, OfficialSplit] = {"train": "train", "val": "valid", "test": "test", "testA": "test", "testB": "test"}
_IMAGES = ("train2014", "images/mscoco/images/train2014", "mscoco/images/train2014", "images/train2014")
_FIELDS = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentence": dict}
_INT64_LIMIT = 1 << 63
LEAKED_EXPRESSIONS = "expressions of part train about images that occur in valid or test"


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


@register_source(name="refcoco")
@register_source(name="refcoco+")
@register_source(name="refcocog")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """A row for each expression. Of part train, those about images that occur in valid or test are left out.

    Raises:
        UserError: missing files, a pickle that is damaged or holds more than plain data, files that are no such JSON.
    """
    return _read(data, Counter())


def segment(data: Data) -> Iterator[Example | InvalidRecord]:
    """As `examples`; facts has the object's `mask` too, of the release's polygons or run lengths.

    Raises:
        UserError: as `examples`.
    """
    return _read(data, Counter(), outlines={})


def skipped_counts(data: Data) -> dict[str, int]:
    """What `examples` leaves out: reason → how many. Reads the whole source once more.

    Raises:
        UserError: as `examples`.
    """
    counts = Counter({LEAKED_EXPRESSIONS: 0})
    for _ in _read(data, counts):
        pass
    return dict(counts)


def _read(data: Data, counts: Counter[str], outlines: dict[Id, str] | None = None) -> Iterator[Example | InvalidRecord]:
    """
    Args:
        outlines: where the objects' masks are kept, if they are wanted: id → the field segmentation, as JSON.
    """
    path, instances = files(data)

    def parse(record: dict[str, Any]) -> tuple[Id, GroundTruthObject]:
        require_fields(record, {"id": int})
        one = parse_object(record, "")
        if outlines is not None:
            outlines[one.id] = json.dumps(record.get("segmentation"))
        return one.id, one

    pictures, objects = JsonTable("image", parse_sized_image), JsonTable("annotation", parse)
    refs = read_plain_pickle(path)
    if not isinstance(refs, list) or not refs:
        raise UserError(f"{path}: a list of referring expressions is needed")
    yield from read_tables(instances, {"images": pictures, "annotations": objects})
    placed = ((one.box, pictures.values[one.image]) for one in objects.values.values() if one.image in pictures.values)
    require_pixels(instances, ((box, found.width, found.height) for box, found in placed))
    asked = {_get(ref, "image_id") for ref in refs if _PARTS.get(_get(ref, "split"), "train") != "train"}
    folder = image_dir(Path(data.root), *_IMAGES)
    parse_ref = _parser(folder, pictures.values, objects.values, asked, counts, outlines)
    yield from RowReader().rows(NumberedFile(path, "ref"), _sentences(refs), parse_ref)


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
    pictures: dict[Id, SizedImage],
    objects: dict[Id, GroundTruthObject],
    asked: set[int | str | None],
    counts: Counter[str],
    outlines: dict[Id, str] | None,
) -> RowParser:
    """A ref with one of its sentences → row.

    Args:
        asked: ids of the images of parts valid and test.
    """

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        key, expression = _sentence(record)
        found, shown = objects.get(record["ann_id"]), pictures.get(record["image_id"])
        if found is None or shown is None or found.image != shown.id:
            raise ValueError("field ann_id or image_id: instances.json has no such object in such an image")
        if reason := outside_image_error(found.box, shown):
            raise ValueError(f"annotation {found.id}: {reason}")
        if not is_visible(found, shown):
            raise ValueError(f"annotation {found.id}: its box has no extent inside the image")
        part = _PARTS[record["split"]]
        if part == "train" and shown.id in asked:
            counts[LEAKED_EXPRESSIONS] += 1
            return []
        facts = {name: record[name] for name in ("ref_id", "ann_id", "image_id", "split")}
        facts |= {"box": xywh_to_xyxy(found.box), "width": shown.width, "height": shown.height}
        if outlines is not None:
            outline = read_segmentation(json.loads(outlines[found.id]), shown.height, shown.width)
            facts["mask"] = write_mask(outline)
        suffix = format_location_tokens([found], shown, {})
        row = Example(str(key), image_name(folder, shown.name), expression, suffix, facts=facts, part=part)
        return [replace(row, part_name=record["split"])]

    return parse


def _is_plain(value: Any, kind: type) -> bool:
    """Whether a value is of a type, and no number that is too long to be written."""
    return type(value) is kind and not (isinstance(value, int) and abs(value) >= _INT64_LIMIT)


def _sentence(record: dict[str, Any]) -> tuple[int, str]:
    """The id and the text of a sentence, once all fields are what they should be.

    No value is shown: what a pickle holds may be too long to write out.
    """
    for name, kind in _FIELDS.items():
        if not _is_plain(record.get(name), kind):
            raise ValueError(f"field {name}: {kind.__name__} expected")
    if record["split"] not in _PARTS:
        raise ValueError(f"field split: one of {', '.join(_PARTS)} expected")
    key, expression = record["sentence"].get("sent_id"), record["sentence"].get("sent")
    if not _is_plain(key, int) or not isinstance(expression, str) or not expression.strip():
        raise ValueError("field sentences: objects with a number `sent_id` and a text `sent` expected")
    if any("\ud800" <= character <= "\udfff" for character in expression):
        raise ValueError("field sentences: a text that is not UTF-8")
    return key, expression.strip()


# Pickles that hold plain data, read without running any code of theirs.
#
# Only lists, dictionaries, tuples, texts, bytes, numbers and numpy's scalars, which become plain numbers, are let
# through. Texts of Python 2 that are no UTF-8 come with lone surrogates.

_KINDS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_KINDS |= {"f2": "e", "f4": "f", "f8": "d"}


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data.

    Raises:
        UserError: missing, damaged, or with anything in it that is not plain data.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="utf-8", errors="surrogateescape").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _NotPlain as error:
        raise UserError(
            f"{path}: {error}", "Such a file could run code when it is read; nothing of it was run."
        ) from None
    except Exception as error:  # damaged pickles raise whatever their bytes happen to ask for
        raise UserError(f"{path}: no pickle, or a damaged one: {error}"[:300]) from None


class _NotPlain(Exception):
    """The pickle wants something that is not plain data."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for modules, known, stand_in in _STAND_INS:
            if module in modules and name == known:
                return stand_in
        raise _NotPlain(f"holds {module}.{name}, which is no plain data"[:200])


class _Type:
    """Stands for numpy's dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self._kind = _KINDS.get(str(name)[:10])
        self._order = "<"

    def __setstate__(self, state: Any) -> None:
        self._order = {">": ">"}.get(state[1], "<")

    def number(self, content: bytes) -> Any:
        """The number in a scalar's bytes."""
        if self._kind is None:
            raise _NotPlain("holds a numpy scalar that is no number")
        return struct.unpack(self._order + self._kind, content)[0]


def _scalar(kind: _Type, content: bytes | str) -> Any:
    """Stands for what makes numpy's scalars; Python 2 has their bytes as text."""
    return kind.number(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `codecs.encode`, with which Python 3 writes bytes where pickles have only text."""
    if encoding != "latin1":
        raise _NotPlain("holds an encoded text")
    return text.encode("latin1")


_STAND_INS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("numpy",), "dtype", _Type),
    (("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
    (("_codecs",), "encode", _bytes),
)
"""Modules and name of what numbers and bytes are pickled with, and what is called instead."""
