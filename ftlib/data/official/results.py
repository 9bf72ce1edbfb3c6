"""Result files in the datasets' own formats: read with every fault named, and written.

A result file is a JSON list of records, one for each id (`[{"question_id": 1, "answer": "yes"}, …]`), or JSONL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ftlib.data.examples import raise_faults
from ftlib.errors import UserError

IDS_SHOWN = 10
Types = dict[str, type | tuple[type, ...]]


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


def _parse(text: str, path: Path, lines_before: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{lines_before + error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists in lists without end
        raise UserError(f"{path}:{lines_before + 1}: not JSON that can be read: {error}") from None


def read_records(path: Path, types: Types) -> list[dict[str, Any]]:
    """Read a JSON list of records, or JSONL if the file's name ends so.

    Args:
        types: the fields that every record must have, with their types.

    Raises:
        UserError: no such list, no record in it, or records with missing or wrong fields (the first 20 in words).
    """
    if path.suffix == ".jsonl":
        lines = enumerate(_text(path).split("\n"))
        records = [_parse(line, path, number) for number, line in lines if line.strip()]
    else:
        records = read_json_file(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: a list of records is needed, found {type(records).__name__}")
    check_records(path, records, types)
    return records


def check_records(path: Path, records: Sequence[Any], types: Types, what: str = "record") -> None:
    """Check that there are records and that each has the fields of `types`.

    Raises:
        UserError: none there, or records with missing or wrong fields (the first 20 in words).
    """
    if not records:
        raise UserError(f"{path}: no {what}s in it")
    faults = []
    for number, record in enumerate(records, 1):
        if fault := _fault(record, types):
            faults.append(f"{path}: {what} {number}: {fault}")
    raise_faults(faults, "Mend the file; nothing was scored.")


def require_fields(record: dict[str, Any], types: Types) -> None:
    """Check an object's fields.

    Raises:
        ValueError: one is missing or of another type.
    """
    for name, kind in types.items():
        if name not in record:
            raise ValueError(f"field {name} is missing")
        value = record[name]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"field {name}: {wanted} expected, found {value!r}"[:200])


def by_id(path: Path, records: Iterable[dict[str, Any]], field: str) -> dict[Any, dict[str, Any]]:
    """Records under their id.

    Raises:
        UserError: ids that occur twice.
    """
    found: dict[Any, dict[str, Any]] = {}
    twice = []
    for record in records:
        if record[field] in found:
            twice.append(record[field])
        found[record[field]] = record
    if twice:
        raise UserError(f"{path}: {field} occurs more than once: {name_ids(twice)}", "Keep one record for each.")
    return found


def require_same_ids(path: Path, found: Iterable[Any], expected: Iterable[Any], field: str) -> None:
    """Check that a result file answers exactly what was asked.

    Raises:
        UserError: missing or unknown ids.
    """
    here, there = set(found), set(expected)
    problems = []
    if missing := there - here:
        problems.append(f"{path}: {len(missing)} of {len(there)} {field}s have no answer: {name_ids(missing)}")
    if unknown := here - there:
        problems.append(f"{path}: {len(unknown)} {field}s that the references do not have: {name_ids(unknown)}")
    if problems:
        raise UserError("\n".join(problems), "Results and references must be of the same split, one answer for each.")


def name_ids(ids: Iterable[Any]) -> str:
    """The first ids in words, in order."""
    ordered = sorted(set(ids), key=lambda value: (str(type(value)), value))
    shown = ", ".join(map(str, ordered[:IDS_SHOWN]))
    return shown + (f" … and {len(ordered) - IDS_SHOWN} more" if len(ordered) > IDS_SHOWN else "")


def _fault(record: Any, types: Types) -> str | None:
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    try:
        require_fields(record, types)
    except ValueError as error:
        return str(error)
    return None
