"""RefCOCO, RefCOCO+ and RefCOCOg: referring expression → box of its object.

In `data.root` or its folder with the name of the source (`refcoco/`, `refcoco+/`, `refcocog/`): `instances.json` and
`refs(unc).p` (RefCOCOg: `refs(umd).p`; `data.file` selects another one, such as refs(google).p); images in
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
    """Return the annotation files that `examples` reads: the pickle of expressions and the instances beside it.

    Raises:
        UserError: the pickle is missing.
    """
    root = Path(data.root)
    name = data.file or ("refs(umd).p" if data.source == "refcocog" else "refs(unc).p")
    own = root / data.source
    refs = find(own if own.is_dir() else root, name) or find(root, name)
    if refs is None:
        raise UserError(f"{root}: {name} is neither there nor in {data.source}/", "Check data.root and data.file.")
    return [refs, refs.with_name("instances.json")]


@register_source(name="refcoco")
@register_source(name="refcoco+")
@register_source(name="refcocog")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each expression; training rows about images that occur in valid or test are skipped.

    Raises:
        UserError: missing files, a pickle that is damaged or contains more than plain data, invalid JSON.
    """
    return _read(data, Counter())


def segment(data: Data) -> Iterator[Example | InvalidRecord]:
    """As `examples`; the facts also have the object's `mask`, from the release's polygons or run lengths.

    Raises:
        UserError: as `examples`.
    """
    return _read(data, Counter(), outlines={})


def skipped_counts(data: Data) -> dict[str, int]:
    """Return reason → number of rows that `examples` skips. Reads the whole source again.

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
        outlines: filled with ID → the field `segmentation` as JSON, if given.
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
        raise UserError(f"{path}: must be a list of referring expressions")
    yield from read_tables(instances, {"images": pictures, "annotations": objects})
    placed = ((one.box, pictures.values[one.image]) for one in objects.values.values() if one.image in pictures.values)
    require_pixels(instances, ((box, found.width, found.height) for box, found in placed))
    asked = {_get(ref, "image_id") for ref in refs if _PARTS.get(_get(ref, "split"), "train") != "train"}
    folder = image_dir(Path(data.root), *_IMAGES)
    parse_ref = _parser(folder, pictures.values, objects.values, asked, counts, outlines)
    yield from RowReader().rows(NumberedFile(path, "ref"), _sentences(refs), parse_ref)


def _get(ref: Any, name: str) -> int | str | None:
    """Return a field of a record if it is a number or text, else None."""
    value = ref.get(name) if isinstance(ref, dict) else None
    return value if isinstance(value, (int, str)) else None


def _sentences(refs: list[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (number of the ref, the ref with one of its sentences)."""
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
    """Return a function that parses a ref with one of its sentences into a row.

    Args:
        asked: IDs of the images of valid and test.
    """

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        key, expression = _sentence(record)
        found, shown = objects.get(record["ann_id"]), pictures.get(record["image_id"])
        if found is None or shown is None or found.image != shown.id:
            raise ValueError("field ann_id or image_id: instances.json has no such object in this image")
        if reason := outside_image_error(found.box, shown):
            raise ValueError(f"annotation {found.id}: {reason}")
        if not is_visible(found, shown):
            raise ValueError(f"annotation {found.id}: its box is empty inside the image")
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
    """Whether a value has a type, and is not too long an integer."""
    return type(value) is kind and not (isinstance(value, int) and abs(value) >= _INT64_LIMIT)


def _sentence(record: dict[str, Any]) -> tuple[int, str]:
    """Validate the fields of a sentence; return its ID and text.

    Messages do not show values, which may be very long.
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


# Read pickles of plain data without running code.
#
# Only lists, dictionaries, tuples, texts, bytes, numbers and numpy scalars (which become plain numbers) are allowed.
# Texts of Python 2 that are not UTF-8 get lone surrogates.

_KINDS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_KINDS |= {"f2": "e", "f4": "f", "f8": "d"}


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data.

    Raises:
        UserError: missing, damaged, or not plain data.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="utf-8", errors="surrogateescape").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _NotPlain as error:
        raise UserError(f"{path}: {error}", "Such a file could run code when it is loaded. No code was run.") from None
    except Exception as error:  # damaged pickles may raise anything
        raise UserError(f"{path}: not a pickle, or damaged: {error}"[:300]) from None


class _NotPlain(Exception):
    """The pickle contains something else than plain data."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for modules, known, stand_in in _STAND_INS:
            if module in modules and name == known:
                return stand_in
        raise _NotPlain(f"contains {module}.{name}, which is not plain data"[:200])


class _Type:
    """Replacement of numpy's dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self._kind = _KINDS.get(str(name)[:10])
        self._order = "<"

    def __setstate__(self, state: Any) -> None:
        self._order = {">": ">"}.get(state[1], "<")

    def number(self, content: bytes) -> Any:
        """Return the number in a scalar's bytes."""
        if self._kind is None:
            raise _NotPlain("contains a numpy scalar that is not a number")
        return struct.unpack(self._order + self._kind, content)[0]


def _scalar(kind: _Type, content: bytes | str) -> Any:
    """Replacement of numpy's constructor of scalars; Python 2 stores their bytes as text."""
    return kind.number(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Replacement of `codecs.encode`, which Python 3 uses for bytes in old pickle protocols."""
    if encoding != "latin1":
        raise _NotPlain("contains an encoded text")
    return text.encode("latin1")


_STAND_INS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("numpy",), "dtype", _Type),
    (("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
    (("_codecs",), "encode", _bytes),
)
"""(Module, name) of the constructors of numbers and bytes → replacement."""
