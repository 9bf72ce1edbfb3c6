"""Datasets by name. A new dataset is one loader function and one line in `SOURCES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ftlib.config import Data
from ftlib.data.digits import make_digits
from ftlib.data.examples import Example, load_prepared, read_examples
from ftlib.data.string_tasks import make_string_tasks

SOURCES: dict[str, Callable[[Path], list[Example]]] = {
    "jsonl": read_examples,
    "digits": read_examples,
    "string_tasks": load_prepared,
}
"""Source → what reads its annotation file."""

MAKERS: dict[str, Callable[[Path], None]] = {"digits": make_digits, "string_tasks": make_string_tasks}
"""Source → what makes it where others are downloaded, into an empty folder."""


def annotation_file(data: Data) -> Path:
    """The file with a dataset's rows."""
    return Path(data.root) / (data.file or "data.jsonl")


def read_source(data: Data) -> list[Example]:
    """All rows of a dataset, checked.

    Raises:
        UserError: missing file or faulty lines.
    """
    return SOURCES[data.source](annotation_file(data))
