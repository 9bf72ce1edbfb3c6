"""One row of a dataset, and a record that cannot be one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftlib.errors import UserError

MAX_ERRORS_SHOWN = 20


@dataclass(slots=True)  # not frozen: that takes three times as long to make, a million times
class Example:
    """One row; whoever has one leaves it as it is.

    Attributes:
        id: unique in its dataset. While a source is read, "" says that the record has none: then it gets one from its
            content (`scan.scan_source`).
        image: path relative to the dataset's root, in its normal form: one picture, one name.
        prefix: the question, as the dataset has it; a prompt template may wrap it.
        suffix: the expected answer; without surrounding space where the task takes that off.
        references: all answers that a metric compares with; none means the suffix alone.
        facts: the dataset's other fields, as they are.
        part: the release's own part that the row belongs to; none where it has no parts.
        group: rows of one group (a document, an animated picture) never fall into different splits; none: the image.
        frame: of an animated image.
        digest: SHA-256 of the image's bytes, once the dataset is prepared.
        dataset: the part of a mixture that it comes from.
        location: file and line, while the source is read.
        stripped: whether space around its answer was taken off, while the source is read.
        unlabelled_turns: how many answers of its conversation are marked as not to be learned; while the source is
            read, in the first row of the conversation.
        part_name: what the source calls `part`, while it is read.
        unused: fields of what the row was made from (its messages, its image's annotations) that nothing uses, while
            the source is read.
        remarks: what may be a mistake in the file that it is from, in words, while the source is read.
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
    location: str = field(default="", compare=False)
    stripped: bool = field(default=False, compare=False)
    unlabelled_turns: int = field(default=0, compare=False)
    part_name: str = field(default="", compare=False)
    unused: frozenset[str] = field(default=frozenset(), compare=False)
    remarks: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class InvalidRecord:
    """A record that cannot be used.

    Attributes:
        location: file and line, or file and record.
        reason: what is wrong with it.
    """

    location: str
    reason: str


def plain_text(value: Any) -> str | None:
    """A field as text: text as it is, a number as it is written; None for anything else, NaN and infinity included."""
    if isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else None


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSONL (into a folder that is not yet published)."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def to_json_line(example: Example, facts: str | None) -> str:
    """A row as one line of JSON, without fields that are empty, and without an id if it has none yet.

    Its hash is part of a split's fingerprint.

    Args:
        facts: `example.facts` as JSON; None if there are none.
    """
    quoted = _quoted
    name = f'"id": {quoted(example.id)}, ' if example.id else ""
    parts = [
        f'{{{name}"image": {quoted(example.image)}, '
        f'"prefix": {quoted(example.prefix)}, "suffix": {quoted(example.suffix)}'
    ]
    if example.references:
        parts.append(f'"references": {json.dumps(list(example.references), ensure_ascii=False)}')
    if facts:
        parts.append(f'"facts": {facts}')
    if example.part:
        parts.append(f'"part": "{example.part}"')
    if example.group:
        parts.append(f'"group": {quoted(example.group)}')
    if example.frame:
        parts.append(f'"frame": {example.frame}')
    if example.digest:
        parts.append(f'"digest": "{example.digest}"')
    if example.dataset:
        parts.append(f'"dataset": {quoted(example.dataset)}')
    return ", ".join(parts) + "}\n"


_quoted = json.encoder.encode_basestring
"""A text in JSON's quotes, as `json.dumps(text, ensure_ascii=False)` writes it."""


def raise_all(errors: list[str], remedy: str) -> None:
    """Raise one UserError for a list of faulty places; do nothing if there are none."""
    if not errors:
        return
    shown = errors[:MAX_ERRORS_SHOWN]
    if len(errors) > len(shown):
        shown.append(f"… and {len(errors) - len(shown)} more")
    raise UserError("\n".join(shown), remedy)
