"""Datasets by name. A new dataset is one loader function and one line in `SOURCES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ftlib.config import Data
from ftlib.data.digits import make_digits
from ftlib.data.digits_detect import make_digits_detect
from ftlib.data.examples import Example, load_prepared, read_examples

SOURCES: dict[str, Callable[[Path], list[Example]]] = {
    "jsonl": read_examples,
    "digits": read_examples,
    "digits_detect": load_prepared,
}
"""Source → what reads its annotation file."""

MAKERS: dict[str, Callable[[Path], None]] = {"digits": make_digits, "digits_detect": make_digits_detect}
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
