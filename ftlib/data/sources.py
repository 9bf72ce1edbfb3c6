"""Datasets by name. A new dataset is one loader module and one line in `SOURCES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from ftlib.config import Data
from ftlib.data.digits import make_digits
from ftlib.data.digits_detect import make_digits_detect
from ftlib.data.examples import Bad, Example
from ftlib.data.string_tasks import make_string_tasks

SOURCES = {
    "coco_captions": "coco_captions",
    "coco_detection": "coco_detection",
    "csv": "csv_table",
    "digits": "jsonl",
    "digits_detect": "jsonl",
    "docvqa": "docvqa",
    "folder": "folder",
    "gqa": "gqa",
    "hub": "hub",
    "instructions": "instructions",
    "jsonl": "jsonl",
    "refcoco": "refcoco",
    "refcoco+": "refcoco",
    "refcocog": "refcoco",
    "string_tasks": "instructions",
    "vqav2": "vqav2",
}
"""Source → the module of `ftlib.data.loaders` that reads it."""

MAKERS: dict[str, Callable[[Path], None]] = {
    "digits": make_digits,
    "digits_detect": make_digits_detect,
    "string_tasks": make_string_tasks,
}
"""Source → what makes it where others are downloaded, into an empty folder."""


def annotation_files(data: Data) -> list[Path]:
    """The files with a dataset's rows; none where the images' names say all.

    Raises:
        UserError: none is there, or those of several releases.
    """
    found: list[Path] = _loader(data).files(data)
    return found


def read_source(data: Data) -> Iterator[Example | Bad]:
    """All rows of a dataset, and the records that are none, one after the other.

    Raises:
        UserError: a missing file, or one that cannot be read at all.
    """
    rows: Iterator[Example | Bad] = _loader(data).examples(data)
    return rows


def left_out(data: Data) -> dict[str, int]:
    """Rows that a loader leaves out for a reason, counted by it."""
    count = getattr(_loader(data), "left_out", None)
    return count(data) if count else {}


def _loader(data: Data) -> ModuleType:
    return importlib.import_module(f"ftlib.data.loaders.{SOURCES[data.source]}")
