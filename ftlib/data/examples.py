"""One row of a dataset, and a record that cannot be one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftlib.errors import UserError

MAX_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        id: unique in its dataset; for JSONL the line number unless the line has an `id`.
        image: path relative to the dataset's root, in its normal form: one picture, one name.
        prefix: the question, as the dataset has it; a prompt template may wrap it.
        suffix: the expected answer, without surrounding space.
        references: all answers that a metric compares with; none means the suffix alone.
        facts: the dataset's other fields, as they are.
        part: the release's own part that the row belongs to; none where it has no parts.
        group: rows of one group (a document, an animated picture) never fall into different splits; none: the image.
        frame: of an animated image.
        digest: SHA-256 of the image's bytes, once the dataset is prepared.
        dataset: the part of a mixture that it comes from.
        place: file and line, while the source is read.
    """

    id: str
    image: str
    prefix: str
    suffix: str
    references: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    part: Literal["train", "valid", "test", ""] = ""
    group: str = ""
    frame: int = 0
    digest: str = ""
    dataset: str = ""
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used.

    Attributes:
        place: file and line, or file and record.
        reason: what is wrong with it.
    """

    place: str
    reason: str


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSONL (into a folder that is not yet published)."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def compact(example: Example) -> dict[str, Any]:
    """A row as JSON, without fields that are empty."""
    needed = ("id", "image", "prefix", "suffix")
    return {name: value for name, value in asdict(example).items() if name in needed or (value and name != "place")}


def raise_faults(faults: list[str], remedy: str) -> None:
    """Raise one UserError for a list of faulty places; do nothing if there are none."""
    if not faults:
        return
    shown = faults[:MAX_FAULTS_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"… and {len(faults) - len(shown)} more")
    raise UserError("\n".join(shown), remedy)
