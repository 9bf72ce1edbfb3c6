"""Read and write result files in the datasets' official formats, with a message for every error.

A result file is a JSON list of records, one for each ID (`[{"question_id": 1, "answer": "yes"}, …]`), or JSONL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ftlib.data.example import plain_text, raise_all
from ftlib.data.sources.json_stream import DuplicateKey, InvalidJson, reject_duplicate_keys
from ftlib.errors import UserError

IDS_SHOWN = 10
_MAX_DIGITS = 100
Value = TypeVar("Value")
Types = dict[str, type | tuple[type, ...]]


def whole_number(text: str) -> int:
    """Parse an integer; for json's `parse_int`.

    Raises:
        ValueError: too many digits to convert the number to a float.
    """
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def read_json_file(path: Path) -> Any:
    """Read an official JSON file.

    Raises:
        UserError: missing, empty, not UTF-8 or not JSON.
    """
    return _parse(_text(path), path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """
    Args:
        line: number of the line, from 1, if the text is a line; None for a whole file.
    """
    before = 0 if line is None else line - 1
    try:
        return json.loads(text, object_pairs_hook=reject_duplicate_keys, parse_int=whole_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{before + error.lineno}: not valid JSON: {error.msg}") from None
    except DuplicateKey as error:
        raise UserError(f"{path}{'' if line is None else f':{line}'}: {error}", "Keep one of them.") from None
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits, too deep nesting
        raise UserError(f"{path}:{before + 1}: cannot be parsed as JSON: {error}") from None


def read_records(path: Path, types: Types, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """Read a JSON list of records, or JSONL, with any file name.

    Args:
        types: the fields that every record must have, with their types.
        may_be_empty: whether an empty list is valid.

    Raises:
        UserError: not such a list, an empty list, or records with missing or wrong fields (lists the first 20).
    """
    text = _text(path)
    if not text.strip():  # a file that is still being written, rather than an empty list
        raise UserError(f"{path}: is empty: contains no records")
    if _is_lines(text):
        lines = enumerate(text.split("\n"), 1)
        records = [_parse(line, path, number) for number, line in lines if line.strip()]
    else:
        records = _parse(text, path)
    if not isinstance(records, list):
        raise UserError(f"{path}: must be a list of records, got {type(records).__name__}")
    if records or not may_be_empty:
        check_records(path, records, types)
    return records


def _is_lines(text: str) -> bool:
    """Whether a text is JSONL: the first line is a complete object."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not first.rstrip().endswith("}"):
        return False
    if not rest.strip():
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def check_records(
    path: Path, records: Sequence[Any], types: Types, what: str = "record", optional: Types | None = None
) -> None:
    """Check that there are records and that each has the fields of `types`; see `require_fields`.

    Raises:
        UserError: no records, or records with missing or wrong fields (lists the first 20).
    """
    if not records:
        raise UserError(f"{path}: contains no {what}s")
    faults = []
    for number, record in enumerate(records, 1):
        if fault := _record_error(record, types, optional):
            faults.append(f"{path}: {what} {number}: {fault}")
    raise_all(faults, "Fix the file; nothing was scored.")


def require_fields(record: dict[str, Any], types: Types, optional: Types | None = None) -> None:
    """Check an object's fields.

    Args:
        optional: fields that may be missing.

    Raises:
        ValueError: one is missing or of another type.
    """
    there = {name: kind for name, kind in (optional or {}).items() if name in record}
    for name, kind in (types | there).items():
        if name not in record:
            raise ValueError(f"field {name} is missing{_available(record)}")
        value = record[name]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"field {name}: {wanted} expected, found {value!r}"[:200])


def _available(record: Mapping[str, Any]) -> str:
    """The fields that a record has, for messages."""
    names = [shown_id(name) for name in record]
    shown = ", ".join(names[:IDS_SHOWN]) + (" …" if len(names) > IDS_SHOWN else "")
    return f"; available: {shown}" if names else ""


def index_by_id(path: Path, records: Iterable[dict[str, Any]], field: str) -> dict[Any, dict[str, Any]]:
    """Return ID → record.

    Raises:
        UserError: IDs are not unique.
    """
    found: dict[Any, dict[str, Any]] = {}
    twice = []
    for record in records:
        if record[field] in found:
            twice.append(record[field])
        found[record[field]] = record
    if twice:
        raise UserError(f"{path}: {field} occurs more than once: {format_ids(twice)}", "Keep one record for each.")
    return found


def match_ids(ids: Iterable[Any], known: Iterable[Any]) -> dict[Any, Any]:
    """Return ID → known ID with the same text: the same one, or the only one of another type (`"7"` and 7).

    IDs without a match, or with several, are not included.
    """
    exact = set(known)
    alike: dict[str, list[Any]] = {}
    for one in exact:
        alike.setdefault(str(one), []).append(one)
    found = {}
    for one in ids:
        written = [one] if one in exact else alike.get(str(one), [])
        if len(written) == 1:
            found[one] = written[0]
    return found


def align_predictions(
    path: Path, answers: Mapping[Any, Value], expected: Iterable[Any], field: str
) -> dict[Any, Value]:
    """Return reference ID → answer; the IDs may differ in type (see `match_ids`).

    Raises:
        UserError: duplicate, missing or unknown IDs.
    """
    expected = list(expected)
    own = match_ids(answers, expected)
    found = {own.get(key, key): value for key, value in answers.items()}
    if len(found) < len(answers):
        twice = [key for key, count in Counter(own.get(key, key) for key in answers).items() if count > 1]
        raise UserError(f"{path}: {field} occurs more than once: {format_ids(twice)}", "Keep one record for each.")
    require_same_ids(path, found, expected, field)
    return found


def require_same_ids(path: Path, found: Iterable[Any], expected: Iterable[Any], field: str) -> None:
    """Check that a result file has an answer for each ID of the references.

    Raises:
        UserError: missing or unknown IDs.
    """
    here, there = set(found), set(expected)
    problems = []
    if missing := there - here:
        problems.append(f"{path}: {len(missing)} of {len(there)} {field}s have no answer: {format_ids(missing)}")
    if unknown := here - there:
        told = f"{len(unknown)} {field}s that are not in the references: {format_ids(unknown)}"
        problems.append(f"{path}: {told}{types_note(unknown, there)}")
    if problems:
        raise UserError("\n".join(problems), "Results and references must be of the same split, one answer for each.")


def types_note(ids: Iterable[Any], known: Iterable[Any]) -> str:
    """The types of IDs and of the references' IDs, if they differ; for messages about unknown IDs."""
    own, theirs = ({"number" if isinstance(one, int) else "text" for one in each} for each in (ids, known))
    if own == theirs or not theirs:
        return ""
    return f" ({' and '.join(sorted(own))}; in the references {' and '.join(sorted(theirs))})"


def shown_id(value: Any) -> str:
    """Return an ID for messages: long ones are shortened, lone surrogates escaped."""
    return f"{value!s:.100}".encode(errors="backslashreplace").decode()


def format_ids(ids: Iterable[Any]) -> str:
    """Return the first IDs as text, in order."""
    ordered = sorted(set(ids), key=lambda value: (str(type(value)), value))
    shown = ", ".join(map(shown_id, ordered[:IDS_SHOWN]))
    return shown + (f" … and {len(ordered) - IDS_SHOWN} more" if len(ordered) > IDS_SHOWN else "")


def _record_error(record: Any, types: Types, optional: Types | None) -> str | None:
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    try:
        require_fields(record, types, optional)
    except ValueError as error:
        return str(error)
    return None


# Large official JSON files, read with a fraction of the memory of plain `json.load`.
#
# Relevant records are parsed as soon as they are read, and everything else is dropped.


def read_large_json(path: Path, field: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """Read a JSON file; every object with `field` is replaced by the result of `parse`.

    Args:
        parse: raises ValueError for an invalid object, which is then replaced by `InvalidJson`.

    Raises:
        UserError: missing, empty, not UTF-8 or not JSON.
    """

    def passed(pairs: list[tuple[str, Any]]) -> Any:
        record = reject_duplicate_keys(pairs)
        if field not in record:
            return record
        try:
            return parse(record)
        except ValueError as error:
            return InvalidJson(str(error))

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=passed, parse_int=whole_number)
    except (OSError, ValueError):
        return read_json_file(path)  # raises the error with a message


def require_parsed(path: Path, records: Iterable[tuple[Any, Any]], kind: type, what: str) -> None:
    """Check that every (number or ID, record) was parsed.

    Raises:
        UserError: lists the first 20 invalid records.
    """
    faults = []
    for key, record in records:
        if not isinstance(record, kind):
            reason = record.reason if isinstance(record, InvalidJson) else "is not a valid object"
            faults.append(f"{path}: {what} {key}: {reason}")
    raise_all(faults, "Fix the file; nothing was scored.")


# JSONL of references and of predictions, one line for each row, for tasks without an official format.
#
# References: `{"id", "references": [text, …]}` or `{"id", "suffix": text}`; predictions: `{"id", "prediction": text}`,
# as `ftlib evaluate` writes predictions.jsonl. Further fields are allowed; rows with the same `image` are one
# group. IDs are compared as text: 7 and "7" are equal. A JSON list of the same records is read as well.

ID: tuple[type, ...] = (str, int)


@dataclass(frozen=True, slots=True)
class Reference(Generic[Value]):
    """The expected value of a row.

    Attributes:
        image: None if the file has none.
    """

    id: str
    expected: Value
    image: str | None

    @property
    def group(self) -> Hashable:
        """The group for resampling: the image, or the row itself."""
        return self.id if self.image is None else ("image", self.image)


def single_file(paths: Sequence[Path], task: str) -> Path:
    """Return the only reference file of a task.

    Raises:
        UserError: not exactly one file.
    """
    if len(paths) != 1:
        raise UserError(f"{task} needs one reference file, JSONL with a line for each row; got {len(paths)}")
    return paths[0]


def read_reference_rows(path: Path, types: Types, parse: Callable[[dict[str, Any]], Value]) -> list[Reference[Value]]:
    """Read references.

    Args:
        types: the fields that every line must have besides its ID.
        parse: line → expected value; raises ValueError with a message.

        Raises:
            UserError: the file is malformed, or IDs are not unique.
    """
    records = _read(path, types)
    expected = _parse_all(path, records, parse)
    images = [record.get("image") for record in records.values()]
    if strange := [image for image in images if not isinstance(image, (str, int, type(None)))]:
        raise UserError(f"{path}: field image: str expected, found {strange[0]!r}"[:200])
    named = [None if image is None else str(image) for image in images]
    return [Reference(*row) for row in zip(records, expected, named, strict=True)]


def read_predictions(
    path: Path, types: Types, parse: Callable[[dict[str, Any]], Value], references: Sequence[Reference[Any]]
) -> list[Value]:
    """Read predictions, in the order of the references' rows.

    Raises:
        UserError: the file is malformed, IDs are not unique, are missing or unknown.
    """
    records = _read(path, types)
    require_same_ids(path, records, [row.id for row in references], "id")
    return _parse_all(path, {row.id: records[row.id] for row in references}, parse)


def read_text_references(path: Path) -> list[Reference[tuple[str, ...]]]:
    """Read text references: all accepted texts, at least one, stripped.

    Raises:
        UserError: the file is malformed, or IDs are not unique.
    """
    return read_reference_rows(path, {}, _accepted)


def read_text_predictions(path: Path, references: Sequence[Reference[Any]]) -> list[dict[str, Any]]:
    """Read text predictions, in the order of the references' rows: `prediction`, stripped, and its `finish_reason`.

    Numbers become text.

    Raises:
        UserError: the file is malformed, IDs are not unique, are missing or unknown.
    """
    return read_predictions(path, {"prediction": (str, int, float)}, _answer, references)


def _read(path: Path, types: Types) -> dict[str, dict[str, Any]]:
    """Return ID as text → line."""
    records = read_records(path, {"id": ID, **types})
    return index_by_id(path, [{**record, "id": str(record["id"])} for record in records], "id")


def _parse_all(
    path: Path, records: Mapping[str, dict[str, Any]], parse: Callable[[dict[str, Any]], Value]
) -> list[Value]:
    values, faults = [], []
    for key, record in records.items():
        try:
            values.append(parse(record))
        except ValueError as error:
            faults.append(f"{path}: id {shown_id(key)}: {error}")
    raise_all(faults, "Fix the file; nothing was scored.")
    return values


def _answer(record: dict[str, Any]) -> dict[str, Any]:
    text = plain_text(record["prediction"])
    if text is None:
        raise ValueError(f"field prediction: must be text or a number, found {record['prediction']!r}"[:200])
    return {"prediction": text.strip(), "finish_reason": record.get("finish_reason")}


def _accepted(record: dict[str, Any]) -> tuple[str, ...]:
    if "references" not in record and "suffix" not in record:
        problem = "field references (a list of texts) or suffix (one text) is missing"
        raise ValueError(f"{problem}{_available(record)}")
    name = "references" if "references" in record else "suffix"
    answers = record[name] if name == "references" else [record[name]]
    texts = [plain_text(one) for one in answers] if isinstance(answers, list) else []
    if not texts or None in texts:
        wanted = "must be a list of at least one text" if name == "references" else "must be text or a number"
        raise ValueError(f"field {name}: {wanted}, found {record[name]!r}"[:200])
    return tuple(text.strip() for text in texts if text is not None)
