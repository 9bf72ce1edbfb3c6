"""Datasets by name. A new dataset is one loader module and one line in `SOURCES`."""

from __future__ import annotations

import importlib
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ftlib.config import Data
from ftlib.data.digits import make_digits
from ftlib.data.digits_detect import make_digits_detect
from ftlib.data.examples import Bad, Example
from ftlib.data.string_tasks import make_string_tasks
from ftlib.errors import UserError

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
    """The files with the rows of a dataset that is no mixture; none where the images' names say all.

    Raises:
        UserError: none is there, or those of several releases.
    """
    found: list[Path] = _loader(data).files(data)
    return found


def version(data: Data) -> list[str]:
    """What tells the content of a dataset without annotation files apart, where its loader knows."""
    known = getattr(_loader(data), "version", None)
    return list(known(data)) if known else []


def read_source(data: Data, task: str = "") -> Iterator[Example | Bad]:
    """All rows of a dataset, and the records that are none, one after the other; of a mixture part after part.

    A mixture's rows have the part's name before their ids and groups, and its folder before their images.

    Args:
        task: some loaders have a function of a task's name, for facts that no other task needs.

    Raises:
        UserError: a missing file, or one that cannot be read at all; images of a part outside the mixture's root.
    """
    for name, part in data.datasets.items():
        folder = Path(os.path.relpath(part.root, data.root)).as_posix()
        loader = _loader(part)
        for row in getattr(loader, task, loader.examples)(part):
            yield _of_part(row, name, folder) if name and isinstance(row, Example) else row


def left_out(data: Data) -> dict[str, int]:
    """Rows that a loader leaves out for a reason, counted by it."""
    found: dict[str, int] = {}
    for name, part in data.datasets.items():
        count = getattr(_loader(part), "left_out", None)
        reasons = count(part) if count else {}
        found |= {f"{name}: {reason}" if name else reason: number for reason, number in reasons.items()}
    return found


def _of_part(row: Example, name: str, folder: str) -> Example:
    if row.image and (folder == ".." or folder.startswith("../")):
        raise UserError(f"part {name}: its images lie outside data.root", "Set data.root to a folder above all parts.")
    image = posixpath.normpath(posixpath.join(folder, row.image)) if row.image else ""
    group = f"{name}/{row.group}" if row.group else ""
    return replace(row, id=f"{name}/{row.id}", image=image, group=group, dataset=name)


def _loader(data: Data) -> ModuleType:
    return importlib.import_module(f"ftlib.data.loaders.{SOURCES[data.source]}")
