"""A row of a dataset, and an invalid record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftlib.errors import UserError

MAX_ERRORS_SHOWN = 20


@dataclass(slots=True)  # not frozen: creating frozen ones takes three times as long, and there are millions
class Example:
    """A row; treat it as immutable.

    Attributes:
        id: unique in its dataset. While a source is read, "" means that the record has no ID; `scan.scan_source` then
            makes one from its content.
        image: path relative to the dataset's root, normalized, so that each image has one name; of several images the
            first; empty: no image.
        prefix: the question as in the dataset; a prompt template may wrap it.
        suffix: the expected answer; without surrounding whitespace if the task strips it.
        references: all answers that a metric compares with; empty: the suffix alone.
        facts: the dataset's other fields, unchanged.
        part: the official split of the row; empty if the dataset has none.
        group: rows of a group (a document, an animated image) are never split; empty: the image is the group.
        frame: index of the frame of an animated image.
        digest: SHA-256 of the image's bytes, set when the dataset is prepared.
        dataset: the dataset of a mixture that the row comes from.
        other_images: paths of the images after the first.
        other_digests: their `digest`s.

        Only while a source is read:
            location: file and line.
            stripped: whether whitespace around the answer was removed.
            unlabelled_turns: number of answers of the conversation that are not trained on; in its first row.
            part_name: the source's name of `part`.
            unused: unused fields of the record (of its messages, or of its image's annotations).
            remarks: possible mistakes in the source file.
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
    other_images: Sequence[str] = ()
    other_digests: Sequence[str] = ()
    location: str = field(default="", compare=False)
    stripped: bool = field(default=False, compare=False)
    unlabelled_turns: int = field(default=0, compare=False)
    part_name: str = field(default="", compare=False)
    unused: frozenset[str] = field(default=frozenset(), compare=False)
    remarks: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def images(self) -> list[str]:
        """Return the paths of all images, in order; empty without images."""
        return [self.image, *self.other_images] if self.image else []

    @property
    def image_files(self) -> tuple[ImageFile, ...]:
        """Return all images, in order. Only the first one may be another frame than the first."""
        if not self.image:
            return ()
        others = zip(self.other_images, self.other_digests or [""] * len(self.other_images), strict=True)
        return (self.image, self.frame, self.digest), *((name, 0, digest) for name, digest in others)


ImageFile = tuple[str, int, str]
"""An image's path, the index of its frame, and the SHA-256 of its bytes."""


@dataclass(frozen=True)
class InvalidRecord:
    """A record that cannot be used.

    Attributes:
        location: file and line, or file and record.
        reason: the error.
    """

    location: str
    reason: str


def plain_text(value: Any) -> str | None:
    """Return a text or a finite number as text; None for anything else."""
    if isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else None


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSONL (to a folder that is not published yet, so not atomically)."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def to_json_line(example: Example, facts: str | None) -> str:
    """Return a row as one line of JSON, without empty fields.

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
    for name, values in (("other_images", example.other_images), ("other_digests", example.other_digests)):
        if values:
            parts.append(f'"{name}": {json.dumps(list(values), ensure_ascii=False)}')
    return ", ".join(parts) + "}\n"


_quoted = json.encoder.encode_basestring
"""Returns a text as `json.dumps(text, ensure_ascii=False)` writes it."""


def raise_all(errors: list[str], remedy: str) -> None:
    """Raise one UserError for a list of errors; do nothing if it is empty."""
    if not errors:
        return
    shown = errors[:MAX_ERRORS_SHOWN]
    if len(errors) > len(shown):
        shown.append(f"… and {len(errors) - len(shown)} more")
    raise UserError("\n".join(shown), remedy)
