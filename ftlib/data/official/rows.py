"""JSONL of references and of predictions, one line for each row, for tasks without an official format.

References: `{"id", "references": [text, …]}` or `{"id", "suffix": text}`; predictions: `{"id", "prediction": text}`, as
`ftlib evaluate` writes predictions.jsonl. Further fields may stand there; rows with the same `image` belong together.
Ids are compared as they are written: 7 and "7" are one. A JSON list of the same records is read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftlib.data.examples import raise_faults
from ftlib.data.official.results import Types, by_id, read_records, require_same_ids
from ftlib.errors import UserError

ID: tuple[type, ...] = (str, int)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Row(Generic[Value]):
    """What is expected in one row.

    Attributes:
        image: None where the file names none.
    """

    id: str
    expected: Value
    image: str | None

    @property
    def group(self) -> Hashable:
        """What is resampled together: the image, or the row itself."""
        return self.id if self.image is None else ("image", self.image)


def only(paths: Sequence[Path], task: str) -> Path:
    """The one reference file of a task.

    Raises:
        UserError: not exactly one file.
    """
    if len(paths) != 1:
        raise UserError(f"{task} needs one reference file, JSONL with a line for each row; got {len(paths)}")
    return paths[0]


def read_rows(path: Path, types: Types, parse: Callable[[dict[str, Any]], Value]) -> list[Row[Value]]:
    """Read references.

    Args:
        types: the fields that every line must have besides its id.
        parse: line → what is expected; raises ValueError with what is wrong.

    Raises:
        UserError: the file is malformed, or ids occur twice.
    """
    records = _read(path, types)
    expected = _parse_all(path, records, parse)
    images = [record.get("image") for record in records.values()]
    if strange := [image for image in images if not isinstance(image, (str, int, type(None)))]:
        raise UserError(f"{path}: field image: str expected, found {strange[0]!r}"[:200])
    named = [None if image is None else str(image) for image in images]
    return [Row(*row) for row in zip(records, expected, named, strict=True)]


def read_answers(
    path: Path, types: Types, parse: Callable[[dict[str, Any]], Value], rows: Sequence[Row[Any]]
) -> list[Value]:
    """Read predictions, in the order of the references' rows.

    Raises:
        UserError: the file is malformed, ids occur twice, are missing or unknown.
    """
    records = _read(path, types)
    require_same_ids(path, records, [row.id for row in rows], "id")
    return _parse_all(path, {row.id: records[row.id] for row in rows}, parse)


def read_texts(path: Path) -> list[Row[tuple[str, ...]]]:
    """Read references that are texts: all that are accepted, at least one, without surrounding space.

    Raises:
        UserError: the file is malformed, or ids occur twice.
    """
    return read_rows(path, {}, _accepted)


def read_predictions(path: Path, rows: Sequence[Row[Any]]) -> list[str]:
    """Read predictions that are texts, without surrounding space, in the order of the references' rows.

    Raises:
        UserError: the file is malformed, ids occur twice, are missing or unknown.
    """
    return read_answers(path, {"prediction": str}, lambda record: record["prediction"].strip(), rows)


def _read(path: Path, types: Types) -> dict[str, dict[str, Any]]:
    """Lines under their ids as they are written."""
    records = read_records(path, {"id": ID, **types})
    return by_id(path, [{**record, "id": str(record["id"])} for record in records], "id")


def _parse_all(
    path: Path, records: Mapping[str, dict[str, Any]], parse: Callable[[dict[str, Any]], Value]
) -> list[Value]:
    values, faults = [], []
    for key, record in records.items():
        try:
            values.append(parse(record))
        except ValueError as error:
            faults.append(f"{path}: id {key}: {error}")
    raise_faults(faults, "Mend the file; nothing was scored.")
    return values


def _accepted(record: dict[str, Any]) -> tuple[str, ...]:
    if "references" not in record and "suffix" not in record:
        raise ValueError("field references (a list of texts) or suffix (one text) is missing")
    texts = record["references"] if "references" in record else [record["suffix"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field references: a list of texts is needed, at least one, found {texts!r}"[:200])
    return tuple(text.strip() for text in texts)
