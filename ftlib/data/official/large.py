"""Large official JSON files, read within a fraction of the memory that plain `json.load` takes.

The records of interest are parsed as soon as the reader has passed them, and what is not needed is forgotten at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.examples import raise_faults
from ftlib.data.official.results import read_json_file


@dataclass(frozen=True, slots=True)
class Faulty:
    """Stands where a record could not be parsed, and says why."""

    reason: str


def read_large_json(path: Path, field: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """Read a JSON file; every object in it that has `field` is replaced by what `parse` makes of it.

    Args:
        parse: raises ValueError, in words, for an object that it cannot parse; `Faulty` then stands in its place.

    Raises:
        UserError: missing, empty, not UTF-8 or not JSON.
    """

    def passed(record: dict[str, Any]) -> Any:
        if field not in record:
            return record
        try:
            return parse(record)
        except ValueError as error:
            return Faulty(str(error))

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_hook=passed)
    except (OSError, ValueError):
        return read_json_file(path)  # which says in words what is wrong


def repeated_keys(path: Path) -> list[str]:
    """Keys that stand more than once in one object of a JSON file; of such, reading keeps the last only."""
    found: list[str] = []

    def passed(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        found.extend(key for key, count in counts.items() if count > 1)

    json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=passed)
    return found


def require_parsed(path: Path, records: Iterable[tuple[Any, Any]], kind: type, what: str) -> None:
    """Check that every (number or id, record) was parsed.

    Raises:
        UserError: the first 20 that were not, in words.
    """
    faults = []
    for key, record in records:
        if not isinstance(record, kind):
            reason = record.reason if isinstance(record, Faulty) else "is not such an object"
            faults.append(f"{path}: {what} {key}: {reason}")
    raise_faults(faults, "Mend the file; nothing was scored.")
