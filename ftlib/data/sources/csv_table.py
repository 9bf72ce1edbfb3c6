"""CSV with a header: columns `image`, `suffix` and, if wanted, `prefix`, `id`, `references` (a JSON list in a cell).

Other names are given in `data.columns`, for example {suffix: label} for classification. A column `part` or `split` says
which split a row belongs to, see `split_names`. Further columns are kept as they are. Quotes are as RFC 4180 has them;
the header tells whether commas, semicolons or tabs stand between cells, or a line `sep=;` before it.
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
from ftlib.data.sources.json_stream import InvalidJson, parse_json, read_lines
from ftlib.data.split_names import SplitNames
from ftlib.errors import UserError

MAX_CELL = 1 << 24
"""Characters."""

_DELIMITERS = (",", ";", "\t")
_MAX_TORN, _MAX_LINES = 1 << 17, 1000
"""A record of more bytes and more lines is a quote that nothing closes, with what it swallowed."""

_NAMED_DELIMITER = re.compile(rb'"?sep=([\t -~])"?\r?\n')
_ESCAPED = re.compile("[\udc80-\udcff]")


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads, data.csv if the config names none."""
    return annotation_paths(data, "data.csv")


@register_source(name="csv")
def examples(data: Data, splits: SplitNames | None = None) -> Iterator[Example | InvalidRecord]:
    """The rows of `data.file` (default data.csv), or of all `data.files`; without a column for them, prompts are empty.

    Raises:
        UserError: as `annotations.read_files`; no header with the columns that are needed, a cell without an end.
    """
    parser = partial(row_parser, data.columns, data.prompt)
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
    """What stands between cells: the columns that are needed are in the header with that one only.

    Raises:
        UserError: they are there with none, or with several; columns of the same name.
    """
    headers = {}
    for delimiter in _named_delimiter(path, data.encoding) or _DELIMITERS:
        number, header = next(_cells(path, data.encoding, delimiter), (1, []))
        headers[delimiter] = header
    fitting = [each for each, header in headers.items() if isinstance(header, list) and not _missing(header, data)]
    if len(fitting) > 1:
        shown = " and ".join(map(repr, fitting))
        raise UserError(f"{path}:{number}: the header can be read with {shown} between cells", "Rename a column.")
    widest = max(headers, key=lambda each: _width(headers[each]))
    found = fitting[0] if fitting else widest if _width(headers[widest]) > 1 else next(iter(headers))
    _check_header(f"{path}:{number}", headers[found], data)
    return found


def _named_delimiter(path: Path, encoding: str) -> str:
    """What the file's first line names, as Excel understands it (`sep=;`); "" if it names none."""
    lines = _Lines(path, encoding)
    next(lines, None)
    return lines.delimiter


def _with_list(record: dict[str, Any], name: str) -> dict[str, Any] | InvalidJson:
    """A cell is text; what should be a list stands there as JSON."""
    if not record.get(name):
        return {key: value for key, value in record.items() if key != name}
    try:
        return {**record, name: parse_json(record[name])}
    except ValueError:
        return InvalidJson(f"field {name}: a JSON list of texts is needed, got {record[name]!r}"[:200])


def _width(header: list[str] | InvalidJson) -> int:
    return len(header) if isinstance(header, list) else 0


def _check_header(location: str, header: list[str] | InvalidJson, data: Data) -> None:
    if isinstance(header, InvalidJson):
        raise UserError(f"{location}: the header cannot be read: {header.reason}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{location}: columns of the same name: {', '.join(twice)}")
    if missing := _missing(header, data):
        have = ", ".join(header) or "none"
        problem = f"{location}: no column {', '.join(missing)}; there are: {have}"
        raise UserError(problem[:1000], "Name the columns in data.columns, such as {suffix: label}.")


def _missing(header: list[str], data: Data) -> list[str]:
    wanted = {"image", "suffix", *data.columns}
    if data.columns.get("references", "references") in header:
        wanted.discard("suffix")
    return sorted(name for field in wanted if (name := str(data.columns.get(field, field))) not in header)


def _cells(path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str] | InvalidJson]]:
    """Every record's cells with the number of its first line; blank lines are passed."""
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
            problem = f"a cell goes on to line {lines.number:,}: a quote that nothing closes?"
            raise UserError(f"{path}:{number}: {problem}", f"Cells have at most {MAX_CELL:,} characters.")
        if isinstance(row, list) and _ESCAPED.search("".join(row)):
            row = InvalidJson(f"not {encoding}" if encoding else f"not UTF-8; {encoding_hint(lines.last)}")
        if row:
            yield number, row


class _Lines:
    """A file's lines as text; bytes that are no UTF-8 come as lone surrogates.

    Attributes:
        number, last: of the last line, and the line itself.
        size: bytes of all lines so far.
        delimiter: what the first line names, which is passed then; "" if it names none.
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
