"""CSV with a header: columns `image`, `suffix` and, optionally, `prefix`, `id`, `references` (a JSON list in a cell).

`data.columns` sets other names, for example {suffix: label} for classification. A column `part` or `split` holds the
split of a row, see `split_names`. Further columns become facts. Quoting is that of RFC 4180; the delimiter (comma,
semicolon or tab) is detected from the header, or set by a line `sep=;` before it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.annotations import annotation_paths, read_files
from ftlib.data.sources.base import row_parser
from ftlib.data.sources.encodings import encoding_hint
from ftlib.data.sources.image_references import ImageLocator
from ftlib.data.sources.json_stream import InvalidJson, parse_json, read_lines
from ftlib.data.split_names import SplitNames
from ftlib.errors import UserError

MAX_CELL = 1 << 24
"""Characters."""

_DELIMITERS = (",", ";", "\t")
_MAX_TORN, _MAX_LINES = 1 << 17, 1000
"""A record with more bytes and lines has an unclosed quote."""

_NAMED_DELIMITER = re.compile(rb'"?sep=([\t -~])"?\r?\n')
_ESCAPED = re.compile("[\udc80-\udcff]")


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads; default: data.csv."""
    return annotation_paths(data, "data.csv")


@register_source(name="csv")
def examples(data: Data, splits: SplitNames | None = None) -> Iterator[Example | InvalidRecord]:
    """Yield the rows of `data.file` (default data.csv), or of all `data.files`; without a prefix column it is empty.

    Raises:
        UserError: as `annotations.read_files`; the header lacks required columns, or a quote is not closed.
    """
    parser = partial(row_parser, data.columns, data.prompt, ImageLocator(data))
    return read_files(data, splits, ("data.csv",), lambda path: ("line", _records(path, data)), parser)


def _records(path: Path, data: Data) -> Iterator[tuple[int, Any]]:
    delimiter = _delimiter(path, data)
    cells = _cells(path, data.encoding, delimiter)
    _, header = next(cells)
    assert isinstance(header, list)
    references = data.columns.get("references", "references")
    defaults = {} if "prefix" in data.columns else {"prefix": ""}
    for number, row in cells:
        if isinstance(row, list) and len(row) != len(header):
            row = InvalidJson(f"{len(row)} cells, but the header has {len(header)}")
        if isinstance(row, InvalidJson):
            yield number, row
        else:
            yield number, _with_list(defaults | dict(zip(header, row, strict=True)), references)


def _delimiter(path: Path, data: Data) -> str:
    """Return the delimiter: the only one with which the header has the required columns.

    Raises:
        UserError: there is none, or several; duplicate column names.
    """
    headers = {}
    for delimiter in _named_delimiter(path, data.encoding) or _DELIMITERS:
        number, header = next(_cells(path, data.encoding, delimiter), (1, []))
        headers[delimiter] = header
    fitting = [each for each, header in headers.items() if isinstance(header, list) and not _missing(header, data)]
    if len(fitting) > 1:
        shown = " and ".join(map(repr, fitting))
        raise UserError(
            f"{path}:{number}: ambiguous delimiter: the header can be read with {shown}", "Rename a column."
        )
    widest = max(headers, key=lambda each: _width(headers[each]))
    found = fitting[0] if fitting else widest if _width(headers[widest]) > 1 else next(iter(headers))
    _check_header(f"{path}:{number}", headers[found], data)
    return found


def _named_delimiter(path: Path, encoding: str) -> str:
    """Return the delimiter in the file's first line (`sep=;`, as in Excel), or ""."""
    lines = _Lines(path, encoding)
    next(lines, None)
    return lines.delimiter


def _with_list(record: dict[str, Any], name: str) -> dict[str, Any] | InvalidJson:
    """Parse a cell with a JSON list."""
    if not record.get(name):
        return {key: value for key, value in record.items() if key != name}
    try:
        return {**record, name: parse_json(record[name])}
    except ValueError:
        return InvalidJson(f"field {name}: must be a JSON list of texts, got {record[name]!r}"[:200])


def _width(header: list[str] | InvalidJson) -> int:
    return len(header) if isinstance(header, list) else 0


def _check_header(location: str, header: list[str] | InvalidJson, data: Data) -> None:
    if isinstance(header, InvalidJson):
        raise UserError(f"{location}: the header cannot be read: {header.reason}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{location}: duplicate columns: {', '.join(twice)}")
    if missing := _missing(header, data):
        have = ", ".join(header) or "none"
        problem = f"{location}: no column {', '.join(missing)}; available: {have}"
        raise UserError(problem[:1000], "Set data.columns, such as {suffix: label}.")


def _missing(header: list[str], data: Data) -> list[str]:
    wanted = {"image", "suffix", *data.columns}
    if data.columns.get("references", "references") in header:
        wanted.discard("suffix")
    return sorted(name for field in wanted if (name := str(data.columns.get(field, field))) not in header)


def _cells(path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str] | InvalidJson]]:
    """Yield the cells of every record with the number of its first line; skips blank lines."""
    csv.field_size_limit(MAX_CELL)
    lines = _Lines(path, encoding)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        number, start, endless = lines.number + 1, lines.size, False
        try:
            row: list[str] | InvalidJson = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row, endless = InvalidJson(f"not CSV: {error}"), "limit" in str(error)
        if endless or (lines.size - start > _MAX_TORN and lines.number - number > _MAX_LINES):
            problem = f"a cell extends to line {lines.number:,}; is a quote not closed?"
            raise UserError(f"{path}:{number}: {problem}", f"Cells have at most {MAX_CELL:,} characters.")
        if isinstance(row, list) and _ESCAPED.search("".join(row)):
            row = InvalidJson(f"not {encoding}" if encoding else f"not UTF-8; {encoding_hint(lines.last)}")
        if row:
            yield number, row


class _Lines:
    """A file's lines as text; bytes that are not UTF-8 become lone surrogates.

    Attributes:
        number, last: number and content of the last line.
        size: bytes of all lines so far.
        delimiter: the delimiter set by the first line, which is then skipped; else "".
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._lines = read_lines(path, encoding)
        self.number, self.size, self.last, self.delimiter = 0, 0, b"", ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, self.last = next(self._lines)
        if self.number == 1 and (named := _NAMED_DELIMITER.fullmatch(self.last)):
            self.delimiter = named[1].decode()
            self.number, self.last = next(self._lines)
        self.size += len(self.last)
        return self.last.decode(errors="surrogateescape")
