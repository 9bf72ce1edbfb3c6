"""Find and read the annotation files of a dataset: `data.file`, the default one, or `data.files` for each split."""

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
from ftlib.data.sources.image_references import is_extracted
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
    """Return the annotation files of a dataset, in the order of its splits.

    Args:
        usual: default file names.

    Raises:
        UserError: there is none, or several default files exist.
    """
    return [path for path, _ in _files(data, usual)]


def chunks_of(data: Data, *usual: str) -> list[FileChunk]:
    """Return all annotation files as chunks of lines; empty if one of them must be read sequentially.

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
    """Yield the rows of all annotation files of a dataset.

    With `data.files`, IDs get the split as a prefix, because each file often numbers its rows from the start. If the
    first image of a file exists relative to the file, and not to `data.root`, its images are relative to the file.

    Args:
        splits: reads split names in the rows.
        records: path → unit of counting, and (number, record) of each record.
        parser: returns the parser for the records of a split.
        chunk: reads only this chunk; the caller must then check `splits` after all chunks.

    Raises:
        UserError: a missing or unreadable file, unknown split names.
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
        problem = f"{root}: contains both {' and '.join(path.name for path in present)}"
        raise UserError(problem, "Set data.file.")
    if present:
        return [(present[0], None)]
    suffixes = {Path(name).suffix for name in usual}
    if found := other_splits(root, suffixes) or splits_in_folders(root, suffixes):
        raise UserError(f"{root}: contains no {' or '.join(usual)}", files_hint(found))
    if len(usual) > 1:
        raise UserError(f"{root}: contains neither {' nor '.join(usual)}", "Set data.file.")
    return [(root / usual[0], None)]


def files_hint(found: dict[str, list[str]]) -> str:
    """Return a hint to list files of splits in data.files.

    Args:
        found: split → names of files.
    """
    lists = ", ".join(
        f"{part}: {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}" for part, names in found.items()
    )
    return f"If these files are splits, set data.files: {{{lists}}}."


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
                names = [one if is_extracted(one) else image_name(folder, one) for one in row.images]
                first, *others = names or [""]
                row.image, row.other_images = first, tuple(others)
        return rows

    return parse_row


# Detect splits that the config does not declare: parts of a mixture that are splits, files beside `data.file`.


def parts_named_as_splits(data: Data) -> dict[str, str]:
    """Return part → split for parts of a mixture that look like splits of one dataset, by part or file names."""
    found: dict[str, str] = {}
    if not data.split.official:  # names of splits do not matter
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
    """Reject parts whose names are split names and whose rows have no split field.

    Args:
        splits: name of the part → split.
        files: dataset → its annotation files.

    Raises:
        UserError: always.
    """
    shown = ", ".join(f"{name} ({split})" for name, split in splits.items())
    problem = f"parts of the mixture have the names of splits, and each would be split separately: {shown}"
    parts = [data.datasets[name] for name in splits]
    remedy = "Read them as one dataset with official splits."
    if all(part.source in (*TABLES, *COCO) for part in parts):
        named: dict[str, list[str]] = {}
        for part, split in zip(parts, splits.values(), strict=True):
            named.setdefault(split, []).extend(os.path.relpath(path, data.root) for path in files(part))
        remedy = files_hint(named)
    raise UserError(problem, f"{remedy} To split each separately, set data.split.official: false.")


def warn_other_files(data: Data) -> None:
    """Warn if files beside an annotation file look like other splits of the same dataset."""
    if data.source not in (*TABLES, *COCO) or data.files or not data.file:
        return
    path = Path(data.root) / data.file
    if data.source in COCO and path.stem.startswith(("captions_", "instances_")):
        return  # an official file; the other files of the release are read, too
    found, folder = other_splits(path.parent, {path.suffix}, path.name), posixpath.dirname(data.file)
    if not found and path.is_file():
        found, folder = _in_other_folders(path), posixpath.dirname(folder)
    if found:
        named = {part: [posixpath.join(folder, name) for name in names] for part, names in found.items()}
        others = [name for names in named.values() for name in names if name != data.file]
        log.warning(f"{path}: not reading {', '.join(others)} beside it. {files_hint(named)}")


def _in_other_folders(path: Path) -> dict[str, list[str]]:
    """Return files of the same name in sibling folders with split names, including the file's own folder."""
    found: dict[str, list[str]] = {}
    for part in ("train", "valid", "test") if split_from_plain_name(path.parent.name) else ():
        for folder in sorted(path.parent.parent.iterdir()):
            if split_from_plain_name(folder.name) == part and (folder / path.name).is_file():
                found.setdefault(part, []).append(f"{folder.name}/{path.name}")
    return found if len(found) > 1 else {}
