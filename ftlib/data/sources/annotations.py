"""Which annotation files a table of rows has: `data.file`, the usual one, or those of each split in `data.files`."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ftlib.config.schema import COCO, TABLES, Data
from ftlib.core import log
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import NumberedFile, RowParser, RowReader
from ftlib.data.sources.json_stream import FileChunk, split_into_chunks
from ftlib.data.sources.release_files import image_name
from ftlib.data.split_names import (
    NamedSplit,
    SplitNames,
    other_splits,
    split_from_name,
    split_from_plain_name,
    splits_in_folders,
    without_split,
)
from ftlib.errors import UserError


def annotation_paths(data: Data, *usual: str) -> list[Path]:
    """The annotation files of a dataset, in the order of its splits.

    Args:
        usual: names of which one is taken where the config names none.

    Raises:
        UserError: it is not clear which.
    """
    return [path for path, _ in _files(data, usual)]


def chunks_of(data: Data, *usual: str) -> list[FileChunk]:
    """All annotation files of a dataset as stretches of lines; none if one of them must be read from its beginning.

    Raises:
        UserError: as `annotation_paths` and `json_stream.read_records`.
    """
    found = [split_into_chunks(path, data.encoding) for path in annotation_paths(data, *usual)]
    return [chunk for file in found for chunk in file] if all(found) else []


def read_files(
    data: Data,
    splits: SplitNames | None,
    usual: tuple[str, ...],
    records: Callable[[Path], tuple[str, Iterable[tuple[int, Any]]]],
    parser: Callable[[SplitNames, NamedSplit | None], RowParser],
    chunk: FileChunk | None = None,
) -> Iterator[Example | InvalidRecord]:
    """The rows of all annotation files of a dataset.

    With `data.files`, ids begin with the split, since they often start anew in each file; and where a file's first
    image lies beside it, and not below `data.root`, the file's images are relative to its folder.

    Args:
        splits: reads the rows' own names of splits.
        records: path → what is counted in it, and (number, record) of each.
        parser: makes what parses the records of a split.
        chunk: what `records` reads of one of the files, the only one that is read; what all rows together say of
            `splits` is then the caller's to settle.

    Raises:
        UserError: a missing or unreadable file, names of splits that are not known.
    """
    splits = splits or SplitNames(data)
    reading, seen = RowReader(), dict.fromkeys(("train", "valid", "test", ""), 0)
    for path, outer in _files(data, usual):
        seen[outer.split if outer else ""] += 1
        if chunk and path != chunk.path:
            continue
        unit, found = records(path)
        parse = parser(splits, outer)
        if outer:
            name = outer.split if seen[outer.split] == 1 else f"{outer.split}-{seen[outer.split]}"
            parse = _in_file(parse, name, Path(data.root), path)
        yield from reading.rows(NumberedFile(path, unit), found, parse)
    if not chunk:
        splits.finish()


def _files(data: Data, usual: tuple[str, ...]) -> list[tuple[Path, NamedSplit | None]]:
    root = Path(data.root)
    if data.files:
        return [(root / name, NamedSplit(part, name)) for part, name in data.split_files]
    if data.file:
        return [(root / data.file, None)]
    present = [root / name for name in usual if (root / name).exists()]
    if len(present) > 1:
        problem = f"{root}: both {' and '.join(path.name for path in present)} lie there"
        raise UserError(problem, "Name the file in data.file.")
    if present:
        return [(present[0], None)]
    suffixes = {Path(name).suffix for name in usual}
    if found := other_splits(root, suffixes) or splits_in_folders(root, suffixes):
        raise UserError(f"{root}: no {' or '.join(usual)} in it", files_hint(found))
    if len(usual) > 1:
        raise UserError(f"{root}: neither {' nor '.join(usual)} lies there", "Name the file in data.file.")
    return [(root / usual[0], None)]


def files_hint(found: dict[str, list[str]]) -> str:
    """What to write for files that are splits.

    Args:
        found: split → names of files.
    """
    lists = ", ".join(
        f"{part}: {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}" for part, names in found.items()
    )
    return f"Files that are splits are given by data.files: {{{lists}}}."


def _in_file(parse: RowParser, name: str, root: Path, path: Path) -> RowParser:
    folder = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else ""
    beside: bool | None = None if folder not in ("", ".") else False

    def parse_row(record: dict[str, Any], number: int) -> list[Example]:
        nonlocal beside
        rows = list(parse(record, number))
        for row in rows:
            row.id = row.id and f"{name}/{row.id}"
            row.group = row.group and f"{name}/{row.group}"
            if beside is None and row.image:
                beside = not (root / row.image).exists() and (path.parent / row.image).exists()
            if beside:
                row.image = image_name(folder, row.image)
        return rows

    return parse_row


# Splits that nobody told ftlib of: parts of a mixture that are the splits of one dataset, files beside `data.file`.


def parts_named_as_splits(data: Data) -> dict[str, str]:
    """Parts of a mixture that look like the splits of one dataset, by their names or those of their files → split."""
    found: dict[str, str] = {}
    if not data.split.official:  # all rows are divided anew
        return found
    parts = {name: part for name, part in data.datasets.items() if name and not part.files}
    paths = {name: os.path.relpath(Path(part.root) / part.file, data.root) for name, part in parts.items()}
    for texts in (dict(zip(parts, parts, strict=True)), paths):
        alike: dict[tuple[str, str], dict[str, str]] = {}
        for name, text in texts.items():
            if split := split_from_name(text):
                alike.setdefault((parts[name].source, without_split(text)), {})[name] = split
        for splits in alike.values():
            found |= splits if len(set(splits.values())) > 1 else {}
    return found


def reject_split_parts(data: Data, splits: dict[str, str], files: Callable[[Data], list[Path]]) -> None:
    """Refuse parts that are splits by their names, and whose rows say nothing of splits.

    Args:
        splits: name of the part → split.
        files: a dataset → its annotation files.

    Raises:
        UserError: always.
    """
    shown = ", ".join(f"{name} ({split})" for name, split in splits.items())
    problem = f"parts of the mixture are splits by their names, and each would be divided by itself: {shown}"
    parts = [data.datasets[name] for name in splits]
    remedy = "Read them as one dataset with splits of its own."
    if all(part.source in (*TABLES, *COCO) for part in parts):
        named: dict[str, list[str]] = {}
        for part, split in zip(parts, splits.values(), strict=True):
            named.setdefault(split, []).extend(os.path.relpath(path, data.root) for path in files(part))
        remedy = files_hint(named)
    raise UserError(problem, f"{remedy} If each is to be divided by itself, set data.split.official: false.")


def warn_other_files(data: Data) -> None:
    """Say that a file of rows has others beside it that look like the other splits of the same dataset."""
    if data.source not in (*TABLES, *COCO) or data.files or not data.file:
        return
    path = Path(data.root) / data.file
    if data.source in COCO and path.stem.startswith(("captions_", "instances_")):
        return  # of the release, whose other files are read
    found, folder = other_splits(path.parent, {path.suffix}, path.name), posixpath.dirname(data.file)
    if not found and path.is_file():
        found, folder = _in_other_folders(path), posixpath.dirname(folder)
    if found:
        named = {part: [posixpath.join(folder, name) for name in names] for part, names in found.items()}
        others = [name for names in named.values() for name in names if name != data.file]
        log.warning(f"{path}: {', '.join(others)} beside it: not read. {files_hint(named)}")


def _in_other_folders(path: Path) -> dict[str, list[str]]:
    """Files of the same name in folders beside a file's that are splits by their names, its own among them."""
    found: dict[str, list[str]] = {}
    for part in ("train", "valid", "test") if split_from_plain_name(path.parent.name) else ():
        for folder in sorted(path.parent.parent.iterdir()):
            if split_from_plain_name(folder.name) == part and (folder / path.name).is_file():
                found.setdefault(part, []).append(f"{folder.name}/{path.name}")
    return found if len(found) > 1 else {}
