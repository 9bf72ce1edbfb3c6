"""What all loaders share: records → rows, faults with their place, ids that occur once."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftlib.data.examples import Bad, Example
from ftlib.data.official.large import Faulty
from ftlib.data.official.streaming import stream_lists

_MOST_SHOWN = 300
Value = TypeVar("Value")
Parse = Callable[[dict[str, Any], int], Sequence[Example]]
"""(record, its number) → its rows; raises ValueError with what is wrong."""


@dataclass(frozen=True)
class Numbered:
    """A file with numbered lines or records.

    Attributes:
        unit: what is counted, from 1.
    """

    path: Path
    unit: str = "record"

    def place(self, number: int) -> str:
        """Where a record stands."""
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}: {self.unit} {number}"


class Ids:
    """Ids, each with a number; 16 bytes for one and at most twice as much in reserve.

    Only 64-bit hashes are kept: among ten million different ids, two are taken for the same with a probability of
    3 · 10⁻⁶.
    """

    _FULL = 0.7

    def __init__(self) -> None:
        self._hashes, self._numbers, self._count = _zeros(1024), _zeros(1024), 0

    def add(self, identity: str, number: int) -> int:
        """Add an id with its number, which is not 0.

        Returns:
            The number that it was added with before, else 0.
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
        """Where a hash lies, or the free place that is next to where it should lie."""
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


class Reading:
    """One reading of a source, file after file; knows the ids of all of them."""

    _MOST = 1 << 40

    def __init__(self) -> None:
        self._ids = Ids()
        self._files: list[Numbered] = []

    def rows(self, file: Numbered, records: Iterable[tuple[int, Any]], parse: Parse) -> Iterator[Example | Bad]:
        """The rows of a file.

        Args:
            records: number and record, or `Faulty` in its place.
        """
        self._files.append(file)
        first = (len(self._files) - 1) * self._MOST
        for number, record in records:
            try:
                found = parse(_object(record), number)
            except ValueError as error:
                yield fault(file.place(number), str(error))
                continue
            for row in found:
                if known := self._ids.add(row.id, first + number):
                    yield fault(
                        file.place(number), f"field id: {row.id!r} stands in {self._where(known, file)} already"
                    )
                else:
                    yield replace(row, place=file.place(number))

    def _where(self, known: int, here: Numbered) -> str:
        file, number = self._files[known // self._MOST], known % self._MOST
        return f"{file.unit} {number}" + (f" of {file.path}" if file.path != here.path else "")


@dataclass
class Kept(Generic[Value]):
    """A list of a JSON file that is read as a whole, for other records to refer to.

    Attributes:
        unit: what one of its records is.
        parse: record → its id and what is kept of it; raises ValueError with what is wrong.
        found: id → what is kept.
    """

    unit: str
    parse: Callable[[dict[str, Any]], tuple[Any, Value]]
    found: dict[Any, Value] = field(default_factory=dict)


def collect(path: Path, lists: Mapping[str, Kept[Any]]) -> Iterator[Bad]:
    """Read lists of a JSON file in one go.

    Args:
        lists: the list's name in the file → where its records are put.

    Yields:
        Faulty records, and those whose id another has already.

    Raises:
        UserError: the file is missing, is no such JSON, or lacks a list.
    """
    for name, number, record in stream_lists(path, lists):
        kept = lists[name]
        place = Numbered(path, kept.unit).place(number)
        try:
            key, value = kept.parse(_object(record))
        except ValueError as error:
            yield fault(place, str(error))
            continue
        if key in kept.found:
            yield fault(place, f"id {key!r} stands in another {kept.unit} already")
        else:
            kept.found[key] = value


def fault(place: str, reason: str) -> Bad:
    """A record that cannot be used; what was found in it is not shown at any length."""
    return Bad(place, reason if len(reason) <= _MOST_SHOWN else reason[:_MOST_SHOWN] + "…")


def needed(text: str, name: str) -> str:
    """What is to be learned, without surrounding space.

    Raises:
        ValueError: it is empty.
    """
    if not text.strip():
        raise ValueError(f"field {name}: is empty, so there is nothing to learn")
    return text.strip()


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, Faulty):
        raise ValueError(record.reason)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _zeros(count: int) -> array[int]:
    return array("q", bytes(8 * count))
