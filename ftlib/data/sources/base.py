"""Common code of all sources: records → rows, errors with locations, unique IDs."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftlib.data.example import Example, InvalidRecord, plain_text
from ftlib.data.prompts import BUILTIN_TEMPLATES, template_fields
from ftlib.data.sources.json_stream import InvalidJson, stream_lists
from ftlib.data.split_names import NamedSplit, SplitNames

_MAX_SHOWN = 300
_QUERY = re.compile(r"(?<=://)([^\s?#'\"]*)[?#][^\s'\"]*")
"""Query string of a URL, which may be its signature."""

Value = TypeVar("Value")
RowParser = Callable[[dict[str, Any], int], Sequence[Example]]
"""(record, its number) → its rows; raises ValueError with a message."""


@dataclass(frozen=True)
class NumberedFile:
    """A file with numbered lines or records.

    Attributes:
        unit: what is numbered from 1: "line", "record", …
    """

    path: Path
    unit: str = "record"

    def location(self, number: int) -> str:
        """Return the location of a record for messages."""
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}: {self.unit} {number}"


class IdSet:
    """A set of IDs, each with a number; 16 to 48 bytes per ID.

    Only 64-bit hashes are stored: among ten million different IDs, the probability of a collision is 3 · 10⁻⁶.
    """

    _FULL = 0.7

    def __init__(self) -> None:
        self._hashes, self._numbers, self._count = _zeros(1024), _zeros(1024), 0

    def add(self, identity: str, number: int) -> int:
        """Add an ID with its number, which must not be 0.

        Returns:
            The number of an earlier equal ID, else 0.
        """
        if self._count >= self._FULL * len(self._hashes):
            self._grow()
        code = hash(identity) or 1
        slot = self._slot(code)
        if self._hashes[slot]:
            return self._numbers[slot]
        self._hashes[slot], self._numbers[slot] = code, number
        self._count += 1
        return 0

    def _slot(self, code: int) -> int:
        """Return the slot of a hash, or the free slot for it (linear probing)."""
        mask = len(self._hashes) - 1
        slot = code & mask
        while (here := self._hashes[slot]) and here != code:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._hashes, self._numbers = _zeros(2 * len(hashes)), _zeros(2 * len(hashes))
        for code, number in zip(hashes, numbers, strict=True):
            if code:
                slot = self._slot(code)
                self._hashes[slot], self._numbers[slot] = code, number


class RowReader:
    """Reads the files of a source and checks that IDs are unique over all of them."""

    _MAX_RECORDS = 1 << 40

    def __init__(self) -> None:
        self._ids = IdSet()
        self._files: list[NumberedFile] = []

    def rows(
        self, file: NumberedFile, records: Iterable[tuple[int, Any]], parse: RowParser
    ) -> Iterator[Example | InvalidRecord]:
        """Yield the rows of a file.

        Args:
            records: (number, record or `InvalidJson`) of each.
        """
        self._files.append(file)
        first = (len(self._files) - 1) * self._MAX_RECORDS
        for number, record in records:
            try:
                found = parse(_object(record), number)
            except ValueError as error:
                yield invalid(file.location(number), str(error))
                continue
            location = file.location(number)
            for row in found:
                if row.id and (known := self._ids.add(row.id, first + number)):
                    yield invalid(location, f"field id: duplicate of {row.id!r} in {self._location_of(known, file)}")
                else:
                    row.location = location
                    yield row

    def _location_of(self, known: int, here: NumberedFile) -> str:
        file, number = self._files[known // self._MAX_RECORDS], known % self._MAX_RECORDS
        return f"{file.unit} {number}" + (f" of {file.path}" if file.path != here.path else "")


@dataclass
class JsonTable(Generic[Value]):
    """A list of a JSON file that is kept in memory, because other records refer to it.

    Attributes:
        unit: name of a record for messages.
        parse_record: record → (ID, value); raises ValueError with a message.
        values: ID → value.
        numbers: numbers of the records in the file, in the same order.
        used: the fields that `parse_record` uses; empty: unused fields are not reported.
        fields: all fields of the records.
    """

    unit: str
    parse_record: Callable[[dict[str, Any]], tuple[Any, Value]]
    used: Collection[str] = ()
    values: dict[Any, Value] = field(default_factory=dict)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    fields: set[str] = field(default_factory=set)


def read_tables(path: Path, lists: Mapping[str, JsonTable[Any]]) -> Iterator[InvalidRecord]:
    """Read several lists of a JSON file in one pass.

    Args:
        lists: name of the list in the file → table for its records.

    Yields:
        Invalid records, and records with a duplicate ID.

    Raises:
        UserError: the file is missing, is not such JSON, or lacks a list.
    """
    for name, number, record in stream_lists(path, lists):
        kept = lists[name]
        location = NumberedFile(path, kept.unit).location(number)
        try:
            key, value = kept.parse_record(_object(record))
            kept.fields.update(record)
        except ValueError as error:
            yield invalid(location, str(error))
            continue
        if key in kept.values:
            yield invalid(location, f"id {key!r}: another {kept.unit} has the same id")
        else:
            kept.values[key] = value
            kept.numbers.append(number)


def unused_fields(lists: Mapping[str, JsonTable[Any]]) -> frozenset[str]:
    """Return `LIST.FIELD` of all unused fields of lists from `read_tables`."""
    unused = {name: kept.fields.difference(kept.used) for name, kept in lists.items() if kept.used}
    return frozenset(f"{name}.{field}" for name, fields in unused.items() for field in fields)


def invalid(location: str, reason: str) -> InvalidRecord:
    """Return an InvalidRecord; a long reason is shortened, and URLs in it lose their query strings."""
    reason = _QUERY.sub(r"\1", reason)
    return InvalidRecord(location, reason if len(reason) <= _MAX_SHOWN else reason[:_MAX_SHOWN] + "…")


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of several, the first."""
    return Counter(answers).most_common(1)[0][0] if len(answers) > 1 else answers[0]


def require_text(text: str, name: str) -> str:
    """Return the text unchanged if it is not empty. The task decides about surrounding whitespace, see `tasks.Task`.

    Raises:
        ValueError: the text is empty.
    """
    if not text or text.isspace():
        raise ValueError(f"field {name}: is empty")
    return text


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, InvalidJson):
        raise ValueError(record.reason)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _zeros(count: int) -> array[int]:
    return array("q", bytes(8 * count))


# Records with plain fields (`image`, `prefix`, `suffix`, …, or other names from the config) → rows.

FIELDS = ("id", "image", "prefix", "suffix", "references")
CHAT_COLUMNS = ("messages", "conversations")
"""Fields that identify a chat."""


def row_parser(
    columns: Mapping[Any, str],
    prompt: str,
    locate: Callable[[str], str],
    splits: SplitNames,
    outer: NamedSplit | None = None,
    may_be_empty: bool = False,
) -> RowParser:
    """Return a function that parses records into rows.

    A row has the ID of its record, if there is one; without a suffix, the most frequent reference is used. All other
    fields become facts.

    Args:
        columns: field of `FIELDS` → name in the records, if it differs.
        prompt: the template; if it does not use the prefix, records may lack it.
        locate: reference of an image → its path, see `image_references.ImageLocator`.
        splits, outer: see `SplitNames.of_row`.
        may_be_empty: whether an empty answer is valid.
    """
    names = {name: str(columns.get(name, name)) for name in FIELDS}
    own = set(names.values())
    may_lack = "prefix" not in columns and prompt not in BUILTIN_TEMPLATES and "prefix" not in template_fields(prompt)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        without = names["prefix"] not in record
        if without and (chat := next((name for name in CHAT_COLUMNS if name in record), "")):
            raise ValueError(f"field {chat}: chats are read by source instructions; hub needs its image column there")
        references = references_of(record, names["references"])
        (image, *others), holding = images_of(record)
        prefix = "" if without and may_lack else text_of(record, names["prefix"])
        asked = references and names["suffix"] not in record
        suffix = most_frequent(references) if asked else answer_of(record, names["suffix"])
        identity = record_id(record, names["id"])
        split = splits.of_row(record, outer)
        if split is None:
            return []
        facts = extra_fields(record, own | holding)
        answer = suffix if may_be_empty else require_text(suffix, names["suffix"])
        row = Example(identity, image, prefix, answer, references, facts, split.split, part_name=split.name)
        row.other_images = tuple(others)
        return [row]

    def images_of(record: dict[str, Any]) -> tuple[list[str], set[str]]:
        """Return the paths of a record's images, and the fields that they are in.

        A row without an image says so by null or an empty list: a missing field may have another name.
        """
        name, several = names["image"], str(columns.get("images", "images"))
        value = record.get(name)
        if value == "":
            raise ValueError(f"field {name}: is empty")
        if not isinstance(record.get(several), list) and (
            name not in record or not isinstance(value, (list, type(None)))
        ):
            return [locate(text_of(record, name))], {name}
        references, fields = record_images(record, columns)
        return [locate(reference) for reference in references or []] or [""], fields

    return parse


def record_images(record: Mapping[str, Any], columns: Mapping[Any, str]) -> tuple[list[str] | None, set[str]]:
    """Return the references of a record's images, and the fields that they are in.

    Returns:
        Paths, `data:` URIs or URLs: one of `image`, or those of a list in `image` or `images`. None if the record has
        no such field, or null in it.

    Raises:
        ValueError: something else in it, or images in both fields.
    """
    names = list(dict.fromkeys(str(columns.get(name, name)) for name in ("image", "images")))
    found: list[str] | None = None
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        paths = [one.get("path") if isinstance(one, dict) else one for one in listed]
        references = [path for path in paths if isinstance(path, str) and path]
        if len(references) < len(paths):
            raise ValueError(f"field {name}: must be a path or a list of paths, got {value!r}"[:200])
        if found and references:
            raise ValueError(f"fields {' and '.join(names)}: images in both; use one of them")
        found = references or found or []
    return found, set(names)


def extra_fields(record: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Return a record's fields that are not fields of a row; a `part` with a plain split name is not included."""
    facts = {name: value for name, value in record.items() if name not in own}
    if facts.get("part") in ("train", "valid", "test"):
        del facts["part"]
    return facts


def record_id(record: Mapping[str, Any], name: str) -> str:
    """Return a record's ID, or "".

    Raises:
        ValueError: the ID is neither text nor an integer.
    """
    identity = record.get(name, "")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f"field {name}: must be text or a whole number, got {identity!r}"[:200])
    if name in record and identity == "":
        raise ValueError(f"field {name}: is empty")
    return str(identity)


def references_of(record: Mapping[str, Any], name: str) -> list[str]:
    """Return a record's references, numbers as text; empty if it has no such field.

    Raises:
        ValueError: the field is not a list of texts.
    """
    references = record.get(name)
    if references is None and name not in record:
        return []
    if isinstance(references, list) and set(map(type, references)) == {str}:
        return references
    texts = [plain_text(one) for one in references] if isinstance(references, list) else [None]
    found = [text for text in texts if text is not None]
    if len(found) != len(texts):
        raise ValueError(f"field {name}: must be a list of texts, got {references!r}"[:200])
    return found


def answer_of(record: Mapping[str, Any], name: str) -> str:
    """Return a field that must be text or a number, as text.

    Raises:
        ValueError: it is missing or of another type.
    """
    text = plain_text(record.get(name))
    return text_of(record, name) if text is None else text


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return a field that must be text.

    Raises:
        ValueError: it is missing or of another type.
    """
    if name not in record:
        there = ", ".join(map(str, record))
        raise ValueError(f"field {name}: is missing; available: {there}"[:200] + " (set data.columns for other names)")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name}: must be text, got {value!r}"[:200])
    return value
