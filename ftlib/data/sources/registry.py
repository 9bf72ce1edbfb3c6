"""Access to sources by name: calls the module that `ftlib.core.registry` lists for a source."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ftlib.config.schema import Data
from ftlib.core import registry
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.annotations import parts_named_as_splits, reject_split_parts
from ftlib.data.sources.json_stream import FileChunk
from ftlib.data.sources.toy import make_digits, make_digits_detect, make_string_tasks
from ftlib.data.split_names import SplitNames
from ftlib.errors import UserError

TOY_DATASETS: dict[str, Callable[[Path], None]] = {
    "digits": make_digits,
    "digits_detect": make_digits_detect,
    "string_tasks": make_string_tasks,
}
"""Toy source → function that writes it into an empty folder, instead of a download."""


def annotation_files(data: Data) -> list[Path]:
    """Return the annotation files of a dataset without mixture; empty if its source has none.

    Raises:
        UserError: files are missing, or there are files of several releases.
    """
    found: list[Path] = _loader(data).files(data)
    return found


def content_version(data: Data) -> list[str]:
    """Return the content version of a dataset without annotation files, if its source provides one."""
    known = getattr(_loader(data), "content_version", None)
    return list(known(data)) if known else []


class SourceChunk(NamedTuple):
    """Rows of a dataset that can be read independently: a chunk of a file of a part ("" without a mixture)."""

    part: str
    chunk: FileChunk


def source_chunks(data: Data) -> list[SourceChunk]:
    """Return all rows of a dataset as chunks, in order; empty if a part must be read sequentially.

    Raises:
        UserError: as `iter_examples`.
    """
    found: list[SourceChunk] = []
    for name, part in data.datasets.items():
        stretches = getattr(_loader(part), "chunks", None)
        own = stretches(part) if stretches else []
        if not own:
            return []
        found += [SourceChunk(name, stretch) for stretch in own]
    return found


def iter_examples(
    data: Data, task: str = "", chunk: SourceChunk | None = None, names: SplitNames | None = None
) -> Iterator[Example | InvalidRecord]:
    """Yield all rows and invalid records of a dataset; for a mixture, part after part.

    In a mixture, the part's name is the prefix of IDs and groups, and the part's folder of image paths. An image's
    absolute path below the root becomes relative to the root.

    Args:
        task: some sources have a function with the name of a task, for facts that only this task needs.
        chunk: read only this chunk from `source_chunks`.
        names: collects the split names of the chunk.

    Raises:
        UserError: a missing or unreadable file; images of a part outside the mixture's root; parts of a mixture with
            names of splits.
    """
    splits = parts_named_as_splits(data)
    called = posixpath.normpath(Path(data.root).absolute().as_posix())
    roots = [f"{path.rstrip('/')}/" for path in dict.fromkeys((called, os.path.realpath(data.root)))]
    for name, part in data.datasets.items():
        if chunk and name != chunk.part:
            continue
        folder = Path(os.path.relpath(part.root, data.root)).as_posix()
        loader = _loader(part)
        read = getattr(loader, task, loader.examples) if task in registry.TASKS else loader.examples
        for row in read(part, names, chunk.chunk) if chunk else read(part):
            if name in splits and isinstance(row, Example) and not row.part:
                reject_split_parts(data, splits, annotation_files)
            yield _in_mixture(row, name, folder, roots) if isinstance(row, Example) else row


def skipped_counts(data: Data) -> dict[str, int]:
    """Return reason → number of rows that sources skip."""
    found: dict[str, int] = {}
    for name, part in data.datasets.items():
        reasons = _skipped_counts(part)
        found |= {f"{name}: {reason}" if name else reason: number for reason, number in reasons.items()}
    return found


def _skipped_counts(data: Data) -> dict[str, int]:
    loader = _loader(data)
    if count := getattr(loader, "skipped_counts", None):
        counted: dict[str, int] = count(data)
        return counted
    if "left_out" not in data.splits:
        return {}
    splits = SplitNames(data)
    for _ in loader.examples(data, splits):
        pass
    return {f"data.splits leaves out {name}": number for name, number in splits.left_out.items()}


def _in_mixture(row: Example, part: str, folder: str, roots: Sequence[str]) -> Example:
    """Return a row of a part with IDs and paths of the mixture.

    Args:
        folder: of the part, relative to the root.
        roots: the root's absolute path, with and without resolved symbolic links.
    """
    images = [_image_in_mixture(image, part, folder, roots) for image in row.images]
    if images != row.images:
        row = replace(row, image=images[0], other_images=images[1:])
    if not part:
        return row
    group = f"{part}/{row.group}" if row.group else ""
    key = f"{part}/{row.id}" if row.id else ""
    return replace(row, id=key, group=group, dataset=part)


def _image_in_mixture(image: str, part: str, folder: str, roots: Sequence[str]) -> str:
    if image.startswith("/"):
        return _below(image, roots) or _below(os.path.realpath(image), roots) or image
    if not part:
        return image
    if folder == ".." or folder.startswith("../"):
        problem = f"part {part}: its images are outside data.root"
        raise UserError(problem, "Set data.root to a folder above all parts.")
    return posixpath.normpath(posixpath.join(folder, image))


def _below(path: str, roots: Sequence[str]) -> str:
    """Return a path relative to the first root that contains it; "" if none does."""
    return next((path.removeprefix(root) for root in roots if path.startswith(root)), "")


def _loader(data: Data) -> ModuleType:
    """Return the module of a source; imports plugins."""
    _, examples = registry.load("source", data.source, data.plugins)
    return sys.modules[examples.__module__]
