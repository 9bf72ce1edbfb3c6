"""JSON files of any size, read record by record: memory is bounded by the largest record.

Records that could be read but not be written again (half a surrogate pair, nested too deep) come as `Faulty`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from ftlib.data.official.large import Faulty
from ftlib.errors import UserError

CHUNK = 1 << 20
"""Characters that are read at once."""

MAX_DEPTH = 64
MAX_DIGITS = 100

_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_TORN = 16
"""What goes wrong, or ends, at most so many characters before the end of what was read may only lack its end: `12`
of `12e-5`, `\\ud8` of `\\ud83d`, `Infin` of `Infinity`."""


def stream_lists(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Read lists of the file's object, in the order of the file.

    Yields:
        The list's name, the record's number in it (from 1), the record or `Faulty`.

    Raises:
        UserError: missing, not UTF-8, not JSON (then after all records before the fault), or without such a list.
    """
    missing = set(names)
    for name, text in _members(path):
        if name in names and text.peek() == "[":
            missing.discard(name)
            for number, record in enumerate(_items(text), 1):
                yield name, number, record
        else:
            _skip(text)
    if missing:
        raise UserError(f"{path}: a list `{sorted(missing)[0]}` is needed")


def stream_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the list that a file holds: number (from 1), record or `Faulty`.

    Raises:
        UserError: missing, not UTF-8, no JSON list (then after all records before the fault).
    """
    with _opened(path) as text:
        if text.peek() != "[":
            raise text.fault("a list of records is needed")
        yield from enumerate(_items(text), 1)
        text.end()


def stream_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the object that a file holds: key, value or `Faulty`; a key that stands there twice comes twice.

    Raises:
        UserError: missing, not UTF-8, no JSON object (then after all members before the fault).
    """
    for name, text in _members(path):
        yield name, text.value()


def parse_json(text: str) -> Any:
    """Read one JSON value that can be written again, too.

    Raises:
        ValueError: not JSON, nested too deep, half a surrogate pair.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if fault := _unwritable(value, text):
        raise ValueError(fault)
    return value


class _Text:
    """A file's text, of which only the part being read is kept."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._position, self._lines, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer) or not self._more():
                return self._buffer[self._position : self._position + 1]

    def take(self, character: str) -> None:
        """Pass a character that must stand here."""
        if self.peek() != character:
            raise self.fault(f"{character!r} expected")
        self._position += 1

    def value(self) -> Any:
        """Read a whole value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except RecursionError:
                raise self.fault(f"nested more than {MAX_DEPTH} deep") from None
            except json.JSONDecodeError as error:
                torn = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _TORN
                if not torn or not self._more():
                    raise self.fault(f"not valid JSON: {error.msg}", error.pos) from None
                continue
            if end + _TORN < len(self._buffer) or not self._more():
                fault = _unwritable(value, self._buffer, self._position, end)
                self._position = end
                return Faulty(fault) if fault else value

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self.fault("not valid JSON: something follows its end")

    def fault(self, problem: str, position: int | None = None) -> UserError:
        """What is wrong, with file and line."""
        line = self._lines + self._buffer.count("\n", 0, self._position if position is None else position)
        return UserError(f"{self._path}:{line}: {problem}")

    def _more(self) -> bool:
        """Read on, twice as much as is still unread, so that long records are not tried too often."""
        if self._ended:
            return False
        try:
            added = self._file.read(max(CHUNK, len(self._buffer) - self._position))
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: not UTF-8: {error}") from None
        self._ended = not added
        if added:
            self._lines += self._buffer.count("\n", 0, self._position)
            self._buffer = self._buffer[self._position :] + added
            self._position = 0
        return bool(added)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Text]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield _Text(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _members(path: Path) -> Iterator[tuple[str, _Text]]:
    """The keys of the file's object; whoever takes one reads its value."""
    with _opened(path) as text:
        if text.peek() != "{":
            raise text.fault("a JSON object is needed")
        for _ in _separated(text, "{", "}"):
            name = text.value()
            if not isinstance(name, str):
                raise text.fault("not valid JSON: a key in quotes expected")
            text.take(":")
            yield name, text
        text.end()


def _items(text: _Text) -> Iterator[Any]:
    for _ in _separated(text, "[", "]"):
        yield text.value()


def _skip(text: _Text) -> None:
    """Pass a value, long lists piece by piece."""
    if text.peek() == "[":
        for _ in _items(text):
            pass
    else:
        text.value()


def _separated(text: _Text, opening: str, closing: str) -> Iterator[None]:
    """Stop before every item of a list or object; whoever takes it reads it."""
    text.take(opening)
    if text.peek() == closing:
        text.take(closing)
        return
    while True:
        yield
        if text.peek() == closing:
            text.take(closing)
            return
        text.take(",")


def _unwritable(value: Any, text: str, start: int = 0, end: int | None = None) -> str:
    """Why a value that stands in `text[start:end]` cannot be written again, if so."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if _HALF_PAIR.search(text, start, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "half a surrogate pair in it, which is no valid Unicode"
    return ""


def _depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _whole_number(text: str) -> int | float:
    """Numbers beyond all measure become infinite, which no field allows; Python refuses to read the longest."""
    return int(text) if len(text) <= MAX_DIGITS else float(text)


_DECODER = json.JSONDecoder(parse_int=_whole_number)
