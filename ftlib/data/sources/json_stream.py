"""JSON files of any size, read record by record: memory is bounded by the largest record.

Records that could be read but not be written again (half a surrogate pair, nested too deep), or with a key twice in an
object, come as `InvalidJson`.
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

# Keys of JSON objects: one that stands there twice is refused. Plain `json.loads` keeps the last one silently.


class DuplicateKey(ValueError):
    """An object has a key twice."""


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; for json's `object_pairs_hook`.

    Raises:
        DuplicateKey: a key stands there twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in record if keys.count(key) > 1)
        raise DuplicateKey(f"key {key[:50]!r} stands twice in one object: {record}"[:200])
    return record


# Records of a file, one after the other.

CHUNK = 1 << 20
"""Characters that are read at once."""

MAX_DEPTH = 64
MAX_DIGITS = 100

_STREAMING_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TORN = 16
"""What goes wrong, or ends, at most so many characters before the end of what was read may only lack its end: `12`
of `12e-5`, `\\ud8` of `\\ud83d`, `Infin` of `Infinity`."""


def stream_lists(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Read lists of the file's object, in the order of the file.

    Yields:
        The list's name, the record's number in it (from 1), the record or `InvalidJson`.

    Raises:
        UserError: missing, not UTF-8, not JSON (then after all records before the fault), without such a list, or with
            a key of the file's object twice.
    """
    missing, keys = set(names), set()
    for name, text in _members(path):
        if name in keys:
            raise text.error(f"key {name[:50]!r} stands twice in one object")
        keys.add(name)
        if name in names and text.peek() == "[":
            missing.discard(name)
            for number, record in enumerate(_items(text), 1):
                yield name, number, record
        else:
            _skip(text)
    if missing:
        raise UserError(f"{path}: a list `{sorted(missing)[0]}` is needed")


def stream_list(path: Path, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """Read the list that a file holds: number (from 1), record or `InvalidJson`.

    Args:
        encoding: of the file, if it is not UTF-8.

    Raises:
        UserError: missing, not UTF-8, no JSON list (then after all records before the fault).
    """
    with _streaming_opened(path, encoding) as text:
        if text.peek() != "[":
            raise text.error("a list of records is needed")
        yield from enumerate(_items(text), 1)
        text.end()


def stream_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the object that a file holds: key, value or `InvalidJson`; a key that stands there twice comes twice.

    Raises:
        UserError: missing, not UTF-8, no JSON object (then after all members before the fault).
    """
    for name, text in _members(path):
        yield name, text.value()


def parse_json(text: str) -> Any:
    """Read one JSON value that can be written again, too.

    Raises:
        ValueError: not JSON, nested too deep, half a surrogate pair, a key twice in an object.
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
    """A file's text, of which only the part being read is kept."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._position, self._lines, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            match = _STREAMING_SPACE.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer) or not self._more():
                return self._buffer[self._position : self._position + 1]

    def take(self, character: str) -> None:
        """Pass a character that must stand here."""
        if self.peek() != character:
            raise self.error(f"{character!r} expected")
        self._position += 1

    def value(self) -> Any:
        """Read a whole value."""
        self.peek()
        repeated, decoder = "", _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._position)
            except DuplicateKey as error:
                repeated, decoder = str(error), _PLAIN  # which finds its end
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
        """Nothing may follow."""
        if self.peek():
            raise self.error("not valid JSON: something follows its end")

    def error(self, problem: str, position: int | None = None) -> UserError:
        """What is wrong, with file and line."""
        line = self._lines + self._buffer.count("\n", 0, self._position if position is None else position)
        return UserError(f"{self._path}:{line}: {problem}")

    def _more(self) -> bool:
        """Read on, twice as much as is still unread, so that long records are not tried too often."""
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
    """Tables of rows may be in other encodings, files of a release may not."""
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
    """The keys of the file's object; whoever takes one reads its value."""
    with _streaming_opened(path) as text:
        if text.peek() != "{":
            raise text.error("a JSON object is needed")
        for _ in _separated(text, "{", "}"):
            name = text.value()
            if not isinstance(name, str):
                raise text.error("not valid JSON: a key in quotes expected")
            text.take(":")
            yield name, text
        text.end()


def _items(text: _JsonScanner) -> Iterator[Any]:
    for _ in _separated(text, "[", "]"):
        yield text.value()


def _skip(text: _JsonScanner) -> None:
    """Pass a value, long lists piece by piece."""
    if text.peek() == "[":
        for _ in _items(text):
            pass
    else:
        text.value()


def _separated(text: _JsonScanner, opening: str, closing: str) -> Iterator[None]:
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
    if _HALF_SURROGATE.search(text, start, end):
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


_PLAIN = json.JSONDecoder(parse_int=_whole_number)
_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=reject_duplicate_keys)


# Text files line by line: one line that is not UTF-8, or no JSON, spoils no other.

MAX_LINE = 1 << 26
"""Bytes; no line of a dataset is longer."""

_HEAD = 1 << 16
"""Bytes at the beginning of a file that tell what it is."""

CHUNK_BYTES = 8 << 20
"""Bytes of a file, roughly, that a process reads by itself."""

_LINES_SPACE = b" \t\r\n"
_ESCAPED = re.compile("[\udc80-\udcff]")


class FileChunk(NamedTuple):
    """Some lines of a file: from byte `start` to before byte `end`; the first of them is line `line`."""

    path: Path
    start: int
    end: int
    line: int


def split_into_chunks(path: Path, encoding: str = "") -> list[FileChunk]:
    """A JSONL file as stretches of whole lines; none for what must be read from its beginning.

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
    """The records of a JSON list, or of JSONL, whichever it is, whatever the file is called.

    Args:
        encoding: `data.encoding`.
        chunk: read only this, of the file's `split_into_chunks`.

    Returns:
        What is counted ("record" or "line"); (number, value or `InvalidJson`) of each.

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
    """The lines of a file with their numbers in UTF-8, line ends and all, without a byte order mark.

    Args:
        encoding: what the file is written in, if not in UTF-8; a line that is not is none of UTF-8, either.
        chunk: read only this, of a file in UTF-8.

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
    """The first line that is not blank, without space around it, and whether more is seen to follow than space."""
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
    """The values of a JSONL file, or `InvalidJson`, with their lines' numbers; blank lines are passed.

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
    """Stands where a record could not be parsed, and says why."""

    reason: str
