"""Datasets by name: what is asked of the module that reads a source, which `ftlib.core.registry` names."""

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
"""Source → what makes it where others are downloaded, into an empty folder."""


def annotation_files(data: Data) -> list[Path]:
    """The files with the rows of a dataset that is no mixture; none where the images' names say all.

    Raises:
        UserError: none is there, or those of several releases.
    """
    found: list[Path] = _loader(data).files(data)
    return found


def content_version(data: Data) -> list[str]:
    """What tells the content of a dataset without annotation files apart, where its loader knows."""
    known = getattr(_loader(data), "content_version", None)
    return list(known(data)) if known else []


class SourceChunk(NamedTuple):
    """Rows of a dataset that can be read by themselves: a stretch of a file of a part; "" if it is no mixture."""

    part: str
    chunk: FileChunk


def source_chunks(data: Data) -> list[SourceChunk]:
    """All rows of a dataset in pieces, in their order; none where a part must be read from its beginning.

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
    """All rows of a dataset, and the records that are none, one after the other; of a mixture part after part.

    A mixture's rows have the part's name before their ids and groups, and its folder before their images. An image's
    absolute path below the root becomes the path from there.

    Args:
        task: some loaders have a function of a task's name, for facts that no other task needs.
        chunk: read only this, of the dataset's `source_chunks`.
        names: takes note of what the piece's rows say of splits.

    Raises:
        UserError: a missing file, or one that cannot be read at all; images of a part outside the mixture's root; parts
            of a mixture that are splits by their names.
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
    """Rows that a loader leaves out for a reason, counted by it."""
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
    """A row with its place among those of all parts.

    Args:
        folder: of the part, relative to the root.
        roots: the root's absolute path, as it is called and as it is without symbolic links.
    """
    image = row.image
    if image.startswith("/"):
        image = _below(image, roots) or _below(os.path.realpath(image), roots) or image
        row = replace(row, image=image)
    elif part and image:
        if folder == ".." or folder.startswith("../"):
            problem = f"part {part}: its images lie outside data.root"
            raise UserError(problem, "Set data.root to a folder above all parts.")
        image = posixpath.normpath(posixpath.join(folder, image))
    if not part:
        return row
    group = f"{part}/{row.group}" if row.group else ""
    key = f"{part}/{row.id}" if row.id else ""
    return replace(row, id=key, image=image, group=group, dataset=part)


def _below(path: str, roots: Sequence[str]) -> str:
    """A path as seen from the first of the roots that it lies below; "" if it lies below none."""
    return next((path.removeprefix(root) for root in roots if path.startswith(root)), "")


def _loader(data: Data) -> ModuleType:
    """The module of a source; a plugin is run here."""
    _, examples = registry.load("source", data.source, data.plugins)
    return sys.modules[examples.__module__]
