"""CSV with a header: columns `image`, `suffix` and, if wanted, `prefix`, `id`, `references` (a JSON list in a cell).

Other names are given in `data.columns`, for example {suffix: label} for classification. Further columns are kept as
they are. UTF-8, with commas, quotes as RFC 4180 has them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.fields import row_parser
from ftlib.data.loaders.lines import read_lines
from ftlib.data.loaders.rows import Numbered, Reading
from ftlib.data.official.large import Faulty
from ftlib.data.official.streaming import parse_json
from ftlib.errors import UserError


def files(data: Data) -> list[Path]:
    """The annotation file that `examples` reads, data.csv if `data.file` names none."""
    return [Path(data.root) / (data.file or "data.csv")]


def examples(data: Data) -> Iterator[Example | Bad]:
    """The rows of `data.file` (default data.csv); prompts are empty where there is no column for them.

    Raises:
        UserError: missing or unreadable file, no header with the columns that are needed, a cell without an end.
    """
    (path,) = files(data)
    return Reading().rows(Numbered(path, "line"), _records(path, data), row_parser(data.columns))


def _records(path: Path, data: Data) -> Iterator[tuple[int, Any]]:
    cells = _cells(path)
    number, header = next(cells, (1, []))
    if isinstance(header, Faulty):
        raise UserError(f"{path}:{number}: the header cannot be read: {header.reason}")
    _check_header(f"{path}:{number}", header, data)
    references = data.columns.get("references", "references")
    defaults = {} if "prefix" in data.columns else {"prefix": ""}
    for number, row in cells:
        if isinstance(row, list) and len(row) != len(header):
            row = Faulty(f"{len(row)} cells, but the header has {len(header)}")
        if isinstance(row, Faulty):
            yield number, row
        else:
            yield number, _with_list(defaults | dict(zip(header, row, strict=True)), references)


def _with_list(record: dict[str, Any], name: str) -> dict[str, Any] | Faulty:
    """A cell is text; what should be a list stands there as JSON."""
    if not record.get(name):
        return {key: value for key, value in record.items() if key != name}
    try:
        return {**record, name: parse_json(record[name])}
    except ValueError:
        return Faulty(f"field {name}: a JSON list of texts is needed, got {record[name]!r}"[:200])


def _check_header(place: str, header: list[str], data: Data) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{place}: columns of the same name: {', '.join(twice)}")
    wanted = {"image", "suffix", *data.columns}
    if data.columns.get("references", "references") in header:
        wanted.discard("suffix")
    missing = sorted(name for field in wanted if (name := str(data.columns.get(field, field))) not in header)
    if missing:
        have = ", ".join(header) or "none"
        problem = f"{place}: no column {', '.join(missing)}; there are: {have}"
        raise UserError(problem[:1000], "Name the columns in data.columns, such as {suffix: label}.")


def _cells(path: Path) -> Iterator[tuple[int, list[str] | Faulty]]:
    """Every record's cells with the number of its first line; blank lines are passed."""
    lines = _Lines(path)
    reader = csv.reader(lines, strict=True)
    while True:
        number = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error):
                problem = f"a cell of more than {csv.field_size_limit():,} characters, or a quote that nothing closes"
                raise UserError(f"{path}:{number}: {problem}") from None
            yield number, Faulty(f"not CSV: {error}")
            continue
        if any("\udc80" <= character <= "\udcff" for cell in row for character in cell if not cell.isascii()):
            yield number, Faulty("not UTF-8")
        elif row:
            yield number, row


class _Lines:
    """A file's lines as text; bytes that are no UTF-8 come as lone surrogates. Knows the last line's number."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        return line.decode(errors="surrogateescape")
