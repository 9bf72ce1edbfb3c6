"""Read JSON files of any size record by record: memory is bounded by the largest record.

Records that cannot be written again (a lone surrogate, nested too deep), or with duplicate keys in an object, are
returned as `InvalidJson`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ftlib.data.sources.encodings import encoding_hint, foreign_encoding, require_text
from ftlib.errors import UserError

# Duplicate keys of JSON objects are errors; plain `json.loads` silently keeps the last one.


class DuplicateKey(ValueError):
    """An object has a duplicate key."""


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; for json's `object_pairs_hook`.

    Raises:
        DuplicateKey: a key is not unique.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in record if keys.count(key) > 1)
        raise DuplicateKey(f"duplicate key {key[:50]!r} in an object: {record}"[:200])
    return record


# Records of a file, in sequence.

CHUNK = 1 << 20
"""Characters per read."""

MAX_DEPTH = 64
MAX_DIGITS = 100

_STREAMING_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TORN = 16
"""An error or end at most this many characters before the end of the buffer may be a truncated token: `12` of `12e-5`,
`\\ud8` of `\\ud83d`, `Infin` of `Infinity`."""


def stream_lists(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Read lists of the file's object, in the order of the file.

    Yields:
        Name of the list, number of the record in it (from 1), the record or `InvalidJson`.

    Raises:
        UserError: the file is missing, is not UTF-8 or not JSON (raised after all records before the error), lacks a
            list, or has a duplicate top-level key.
    """
    missing, keys = set(names), set()
    for name, text in _members(path):
        if name in keys:
            raise text.error(f"duplicate key {name[:50]!r} in an object")
        keys.add(name)
        if name in names and text.peek() == "[":
            missing.discard(name)
            for number, record in enumerate(_items(text), 1):
                yield name, number, record
        else:
            _skip(text)
    if missing:
        raise UserError(f"{path}: has no list `{sorted(missing)[0]}`")


def stream_list(path: Path, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """Read a file with a list: yields number (from 1), record or `InvalidJson`.

    Args:
        encoding: of the file, if it is not UTF-8.

    Raises:
        UserError: missing, not UTF-8, not a JSON list (raised after all records before the error).
    """
    with _streaming_opened(path, encoding) as text:
        if text.peek() != "[":
            raise text.error("must be a list of records")
        yield from enumerate(_items(text), 1)
        text.end()


def stream_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a file with an object: yields key, value or `InvalidJson`, also of duplicate keys.

    Raises:
        UserError: missing, not UTF-8, not a JSON object (raised after all members before the error).
    """
    for name, text in _members(path):
        yield name, text.value()


def parse_json(text: str) -> Any:
    """Parse a JSON value that can be written again.

    Raises:
        ValueError: not JSON, nested too deep, a lone surrogate, a duplicate key.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except DuplicateKey:
        raise
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if fault := _unwritable(value, text):
        raise ValueError(fault)
    return value


class _JsonScanner:
    """A file's text; only the part being read is in memory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._position, self._lines, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """Return the next character that is not whitespace; "" at the end."""
        while True:
            match = _STREAMING_SPACE.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer) or not self._more():
                return self._buffer[self._position : self._position + 1]

    def take(self, character: str) -> None:
        """Skip an expected character."""
        if self.peek() != character:
            raise self.error(f"{character!r} expected")
        self._position += 1

    def value(self) -> Any:
        """Read a value."""
        self.peek()
        repeated, decoder = "", _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._position)
            except DuplicateKey as error:
                repeated, decoder = str(error), _PLAIN  # to find the end of the value
                continue
            except RecursionError:
                raise self.error(f"nested more than {MAX_DEPTH} deep") from None
            except json.JSONDecodeError as error:
                torn = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _TORN
                if not torn or not self._more():
                    raise self.error(f"not valid JSON: {error.msg}", error.pos) from None
                continue
            if end + _TORN < len(self._buffer) or not self._more():
                fault = repeated or _unwritable(value, self._buffer, self._position, end)
                self._position = end
                return InvalidJson(fault) if fault else value

    def end(self) -> None:
        """Check that only whitespace follows."""
        if self.peek():
            raise self.error("not valid JSON: unexpected content after its end")

    def error(self, problem: str, position: int | None = None) -> UserError:
        """Return a UserError with file and line."""
        line = self._lines + self._buffer.count("\n", 0, self._position if position is None else position)
        return UserError(f"{self._path}:{line}: {problem}")

    def _more(self) -> bool:
        """Read twice as much as is unread, so that long records are not parsed too often."""
        if self._ended:
            return False
        try:
            added = self._file.read(max(CHUNK, len(self._buffer) - self._position))
        except UnicodeError as error:
            name = "UTF-8" if self._file.encoding == "utf-8-sig" else self._file.encoding
            raise UserError(f"{self._path}: not {name}: {error}", _remedy(error)) from None
        self._ended = not added
        if added:
            self._lines += self._buffer.count("\n", 0, self._position)
            self._buffer = self._buffer[self._position :] + added
            self._position = 0
        return bool(added)


def _remedy(error: UnicodeError) -> str:
    """Return a hint about encodings; only some sources support `data.encoding`."""
    shown = error.object[error.start : error.start + 200] if isinstance(error, UnicodeDecodeError) else b""
    return f"Write it in UTF-8; for sources csv, jsonl and instructions, {encoding_hint(shown)}."


@contextlib.contextmanager
def _streaming_opened(path: Path, encoding: str = "") -> Iterator[_JsonScanner]:
    try:
        with path.open(encoding=encoding or "utf-8-sig") as file:
            yield _JsonScanner(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _members(path: Path) -> Iterator[tuple[str, _JsonScanner]]:
    """Yield the keys of the file's object; the caller must read each value."""
    with _streaming_opened(path) as text:
        if text.peek() != "{":
            raise text.error("must be a JSON object")
        for _ in _separated(text, "{", "}"):
            name = text.value()
            if not isinstance(name, str):
                raise text.error("not valid JSON: expected a key in quotes")
            text.take(":")
            yield name, text
        text.end()


def _items(text: _JsonScanner) -> Iterator[Any]:
    for _ in _separated(text, "[", "]"):
        yield text.value()


def _skip(text: _JsonScanner) -> None:
    """Skip a value; long lists are read piece by piece."""
    if text.peek() == "[":
        for _ in _items(text):
            pass
    else:
        text.value()


def _separated(text: _JsonScanner, opening: str, closing: str) -> Iterator[None]:
    """Yield before every item of a list or object; the caller must read the item."""
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
    """Return why the value of `text[start:end]` cannot be written again, or ""."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if _HALF_SURROGATE.search(text, start, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "contains a lone surrogate, which is not valid Unicode"
    return ""


def _depth(value: Any) -> int:
    """Return the nesting depth of lists and objects."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _whole_number(text: str) -> int | float:
    """Parse an integer; too large ones, which Python refuses to parse, become infinite, which no field allows."""
    return int(text) if len(text) <= MAX_DIGITS else float(text)


_PLAIN = json.JSONDecoder(parse_int=_whole_number)
_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=reject_duplicate_keys)


# Text files by line: a line that is not UTF-8 or not JSON does not affect others.

MAX_LINE = 1 << 26
"""Maximum bytes per line."""

_HEAD = 1 << 16
"""Number of first bytes of a file that are checked."""

CHUNK_BYTES = 8 << 20
"""Approximate bytes per chunk."""

_LINES_SPACE = b" \t\r\n"
_ESCAPED = re.compile("[\udc80-\udcff]")


class FileChunk(NamedTuple):
    """Lines of a file: bytes `start` to `end` (exclusive); the first line has number `line`."""

    path: Path
    start: int
    end: int
    line: int


def split_into_chunks(path: Path, encoding: str = "") -> list[FileChunk]:
    """Split a JSONL file into chunks of whole lines; empty if the file must be read sequentially.

    Raises:
        UserError: as `read_records`.
    """
    if encoding or read_records(path)[0] != "line":
        return []
    found, start, line = [], 0, 1
    with _lines_opened(path, encoding) as file:
        while block := file.read(CHUNK_BYTES):
            block += file.readline(MAX_LINE)
            found.append(FileChunk(path, start, start + len(block), line))
            start += len(block)
            line += block.count(b"\n")
    return found


def read_records(
    path: Path, encoding: str = "", chunk: FileChunk | None = None
) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Read the records of a JSON list or JSONL, independent of the file name.

    Args:
        encoding: `data.encoding`.
        chunk: read only this chunk from `split_into_chunks`.

    Returns:
        The unit of numbering ("record" or "line"); (number, value or `InvalidJson`) of each record.

    Raises:
        UserError: missing, unreadable, in another encoding, or an object over several lines.
    """
    if chunk:
        return "line", read_json_lines(path, encoding, chunk)
    first, more = _first_line(path, encoding)
    if first == b"{" and more:
        problem = f"{path}: a JSON object over several lines"
        raise UserError(problem, "Write a list of records, [{…}, {…}], or one record in a line.")
    if first.startswith(b"[") and not (more and _is_json(first)):
        return "record", stream_list(path, encoding)
    return "line", read_json_lines(path, encoding)


def read_lines(path: Path, encoding: str = "", chunk: FileChunk | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) in UTF-8, with line ends, without a byte order mark.

    Args:
        encoding: of the file, if it is not UTF-8; a line that is not in this encoding is returned as invalid UTF-8.
        chunk: read only this chunk, of a file in UTF-8.

    Raises:
        UserError: missing, unreadable, in another encoding, or a line of more than `MAX_LINE` bytes.
    """
    number, left = (chunk.line - 1, chunk.end - chunk.start) if chunk else (0, sys.maxsize)
    with _lines_opened(path, encoding) as file:
        if chunk:
            file.seek(chunk.start)
        lines = _in_utf8(file, encoding) if encoding else iter(lambda: file.readline(MAX_LINE), b"")
        for line in lines:
            number += 1
            if len(line) >= MAX_LINE:
                raise UserError(f"{path}:{number}: more than {MAX_LINE >> 20} MiB in one line")
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            left -= len(line)
            if left <= 0:
                return


@contextlib.contextmanager
def _lines_opened(path: Path, encoding: str) -> Iterator[BufferedReader[FileIO]]:
    try:
        with BufferedReader(FileIO(path), _HEAD) as file:
            require_text(path, file.peek())
            if not encoding and (found := foreign_encoding(file.peek())):
                raise UserError(f"{path}: not UTF-8; it looks like {found}", f"Set data.encoding: {found}")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "Check data.root and data.file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{path}: not {encoding}: {error}", "Check data.encoding.") from None


def _in_utf8(file: BufferedReader[FileIO], encoding: str) -> Iterator[bytes]:
    with TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n") as text:
        while line := text.readline(MAX_LINE):
            faulty = not line.isascii() and _ESCAPED.search(line)
            yield b"\xff" + line.encode(errors="replace") if faulty else line.encode()


def _first_line(path: Path, encoding: str) -> tuple[bytes, bool]:
    """Return the first line that is not blank, stripped, and whether more content follows."""
    with _lines_opened(path, encoding) as file:
        head = file.peek()
        if encoding:
            head = codecs.getincrementaldecoder(encoding)("replace").decode(head).encode(errors="replace")
    line, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip(_LINES_SPACE).partition(b"\n")
    return line.strip(_LINES_SPACE), bool(rest.strip(_LINES_SPACE))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode())
    except ValueError:
        return False
    return True


def read_json_lines(path: Path, encoding: str = "", chunk: FileChunk | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value or `InvalidJson`) of a JSONL file; skips blank lines.

    Raises:
        UserError: missing, unreadable, or a line of more than `MAX_LINE` bytes.
    """
    for number, line in read_lines(path, encoding, chunk):
        if line.strip():
            try:
                yield number, parse_json(line.decode())
            except UnicodeDecodeError as error:
                yield (
                    number,
                    InvalidJson(f"not {encoding}" if encoding else f"not UTF-8: {error}; {encoding_hint(line)}"),
                )
            except ValueError as error:
                yield number, InvalidJson(str(error))


@dataclass(frozen=True, slots=True)
class InvalidJson:
    """A record that could not be parsed, and why."""

    reason: str
