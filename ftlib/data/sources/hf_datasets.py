"""A dataset of the hub, or a local folder: Parquet, JSON, CSV or images that `datasets.load_dataset` reads, or the
output of `save_to_disk`.

`data.file` is its name, `owner/name` or `owner/name:subset`, or the path of the folder. It is read from the shared
cache; `fetch` downloads it and extracts embedded images to `<data.root>/.images/<version>/<split>/`. Another version of
the data (commit, or content of the files) or another subset has separate images. An image file that a row refers to
must be inside the dataset (or, for a local folder, `data.root`), so that rows cannot bring other files into the store.
Columns are set in `data.columns`. An image column may contain lists of images. A dataset with `messages` or
`conversations` and no column of answers, or without an image column but with a prompt column (`instruction` or the name
in the config), is read as instructions. Columns that are not texts, numbers or lists of these are not read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core import files as core_files
from ftlib.core import log
from ftlib.core.hashes import hash_files
from ftlib.core.paths import find_site
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import CHAT_COLUMNS, NumberedFile, RowParser, RowReader, row_parser
from ftlib.data.sources.hf_tables import files_of, folders_of, inner_type, is_plain, load_tables, records
from ftlib.data.sources.image_references import ImageLocator
from ftlib.data.sources.instructions import instruction_parser
from ftlib.data.split_names import NamedSplit, SplitNames
from ftlib.errors import UserError
from ftlib.hub.cache import Repository, find_staged, is_local_path
from ftlib.hub.offline import offline

_NO_ID = "no column of ids"
"""Name of the ID column without `data.columns`: `id` is not used, because each split often numbers its rows anew."""

_PICTURES_HELD = 16
"""Rows in memory while images are extracted."""

_PICTURES = ".images"
"""Folder in `data.root`. Hidden, because `datasets` would read it if `data.root` is the dataset itself."""

_FAULTS = "faults.json"
"""File beside the splits' folders: split → row number → why the row has no image."""

_COUNTS = "counts.json"
"""File beside it: split → row number → number of images, of rows that have none or several."""

_ONE_ONLY = "images in this row instead of one"
"""In a fault of version 0.1, which extracted only lists of one image."""


def files(data: Data) -> list[Path]:
    """Return no files; `examples` reads the shared cache."""
    return []


def content_version(data: Data) -> list[str]:
    """Return the staged commit, or the files of a local folder with their SHA-256."""
    name = data.file.partition(":")[0]
    if is_local_path(name):
        folder = Path(name).expanduser()
        return [f"{file} {digest}" for file, digest in hash_files(folder, files_of(data), find_site()).items()]
    staged = find_staged(Repository("dataset", name, None), find_site())
    return [staged.name] if staged else []


@register_source(name="hub")
def examples(data: Data, splits: SplitNames | None = None) -> Iterator[Example | InvalidRecord]:
    """Yield the rows of all splits; they have IDs if `data.columns` sets an ID column.

    With a single split, a column `part` or `split` is used; else it must agree with the splits, unless
    `data.columns.part` is set.

    Raises:
        UserError: `datasets` is not installed, the dataset is not in the cache or cannot be read, missing columns,
            images that are not extracted, unknown split names.
    """
    reading = RowReader()
    with offline():
        tables = load_tables(data)
    pictures = _pictures(data, tables)
    if pictures and not (Path(data.root) / pictures / core_files.COMPLETE_MARKER).is_file():
        problem = f"dataset {data.file}: its images are not extracted ({Path(data.root) / pictures})"
        raise UserError(problem, "Run `ftlib stage CONFIG`, or in the container `jobs/run.sh ftlib stage CONFIG`.")
    noted = Path(data.root) / pictures / _FAULTS
    faults = core_files.read_json(noted) if pictures and noted.is_file() else {}
    counted = noted.with_name(_COUNTS)
    counts = core_files.read_json(counted) if pictures and counted.is_file() else {}
    if unread := {name for table in tables.values() for name in table.features if not _is_read(data, table, name)}:
        log.warning(f"dataset {data.file}: columns not read: {', '.join(sorted(unread))}")
    splits = splits or SplitNames(data)
    by_rows = len(tables) == 1 or "part" in data.columns
    named = {} if by_rows else {split: splits.split(split, table.num_rows) for split, table in tables.items()}
    splits.require_known()
    for split, table in tables.items():
        if split in named and named[split] is None:
            continue
        extracted = _Extracted(pictures, split, faults.get(split, {}), counts.get(split, {}))
        parse, wanted = _parser(data, split, table, extracted, splits, named.get(split))
        numbered = enumerate(records(data, table, wanted), 1)
        yield from reading.rows(NumberedFile(Path(data.file), f"{split} row".strip()), numbered, parse)
    splits.finish()


def fetch(data: Data) -> None:
    """Extract the images of a dataset in the shared cache to `data.root`; reports rows without an image.

    Raises:
        UserError: no such dataset, no connection, storage full or read-only.
    """
    known = content_version(data)
    root = Path(data.root)
    if known and (
        _is_whole(root / _picture_folder(data, known)) or _is_whole(root / _picture_folder(data, known, True))
    ):
        return
    tables = load_tables(data)
    pictures = _pictures(data, tables)
    if not pictures or core_files.is_complete(root / pictures):
        return
    name = data.columns.get("image", "image")
    faults: dict[str, dict[int, str]] = {}
    counts: dict[str, dict[int, int]] = {}
    with core_files.atomic_directory(root / pictures) as folder:
        for split, table in tables.items():
            if _has_pictures(table, name):
                (folder / split).mkdir(exist_ok=True)
                rows = records(data, table, [name], _PICTURES_HELD)
                faults[split], counts[split] = _write_pictures(rows, name, folder / split, folders_of(data))
        core_files.write_json(folder / _FAULTS, faults)
        core_files.write_json(folder / _COUNTS, counts)
    for split, found in faults.items():
        if found:
            number, reason = next(iter(found.items()))
            log.warning(f"dataset {data.file}: {split} row {number}: {reason}")
            log.warning(f"{len(found)} rows of {split} have no image; `ftlib prepare` reports or skips them")


def _pictures(data: Data, tables: Mapping[str, Any]) -> str:
    """Return the folder of a dataset's extracted images, relative to `data.root`; "" without embedded images."""
    column = data.columns.get("image", "image")
    if not any(_has_pictures(table, column) for table in tables.values()):
        return ""
    cached = (entry["filename"] for table in tables.values() for entry in table.cache_files)
    known = content_version(data) or [core_files.file_sha256(Path(name)) for name in cached]
    plain = _picture_folder(data, known)
    if _is_whole(Path(data.root) / plain) or not any(
        inner_type(table.features.get(column)) for table in tables.values()
    ):
        return plain
    return _picture_folder(data, known, True)


def _picture_folder(data: Data, known: list[str], lists: bool = False) -> str:
    """Return the folder for the images of a column of a version of the dataset.

    Args:
        lists: whether the column contains lists of images; version 0.1 extracted those of one image to the folder of
            other columns.
    """
    subset, column = data.file.partition(":")[2], data.columns.get("image", "image")
    return f"{_PICTURES}/{core_files.json_sha256([known, subset, column, *(['lists'] if lists else [])])[:12]}"


def _is_whole(folder: Path) -> bool:
    """Whether images are extracted, and none are missing because version 0.1 did not extract several of a row."""
    if not core_files.is_complete(folder):
        return False
    noted = folder / _FAULTS
    faults = core_files.read_json(noted) if noted.is_file() else {}
    return not any(_ONE_ONLY in reason for found in faults.values() for reason in found.values())


@dataclass(frozen=True)
class _Extracted:
    """The extracted images of a split.

    Attributes:
        folder: their folder, relative to `data.root`; "" without embedded images.
        faults: row number → why the row has no image.
        counts: row number → number of images, of rows that have none or several.
    """

    folder: str
    split: str
    faults: Mapping[str, str]
    counts: Mapping[str, int]

    def of_row(self, number: int) -> str | list[str]:
        """Return the path of a row's image, or the paths of none or several."""
        place, count = f"{self.folder}/{self.split}", self.counts.get(str(number), 1)
        names = [f"{place}/{_picture_name(number, index, count)}" for index in range(count)]
        return names[0] if count == 1 else names


def _has_pictures(table: Any, name: str) -> bool:
    """Whether a column contains images instead of their names: images, records of bytes and path, bytes, or lists of
    these.
    """
    feature = table.features.get(name)
    feature = inner_type(feature) or feature
    held = feature.get("bytes") if isinstance(feature, dict) else feature
    return type(feature).__name__ == "Image" or getattr(held, "dtype", "") in ("binary", "large_binary")


def _parser(
    data: Data,
    split: str,
    table: Any,
    extracted: _Extracted,
    splits: SplitNames,
    outer: NamedSplit | None,
) -> tuple[RowParser, list[str]]:
    """Return a parser for the rows of a split, and the columns that it needs.

    Args:
        splits, outer: see `SplitNames.of_row`; without `outer`, rows without a split field belong to `split`.
    """
    features = table.features
    columns: dict[Any, str] = {"id": _NO_ID} | dict(data.columns)
    suffix = columns.get("suffix", "suffix")
    image = columns.get("image", "image")
    missing = sorted(name for name in data.columns.values() if name not in features)
    text_only = image not in features and not features.keys().isdisjoint(
        (*CHAT_COLUMNS, columns.get("prefix", "instruction"))
    )
    if missing or (image not in features and not text_only):
        problem = f"dataset {data.file}: split {split} has no column {', '.join(missing or [image])}"
        raise UserError(f"{problem}; available: {', '.join(features)}"[:1000], "Set data.columns.")
    if text_only and (media := [name for name, feature in features.items() if _is_media(feature)]):
        problem = f"dataset {data.file}: column {media[0]} of split {split} would not be used"
        raise UserError(problem, "Set it as the column of images: data.columns: {image: …}; or remove it.")
    chat = not (
        features.keys().isdisjoint(CHAT_COLUMNS) or {suffix, columns.get("references", "references")} & set(features)
    )
    read = (
        instruction_parser(data, splits, outer, columns)
        if text_only or chat
        else row_parser(columns, data.prompt, ImageLocator(data), splits, outer)
    )
    labels = {name: feature.names for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    prompted = columns.get("prefix", "prefix") in features
    pictures = _has_pictures(table, image)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        own = {
            name: value for name, value in record.items() if value is not None
        }  # null means that the row lacks the field
        if pictures and str(number) in extracted.faults:
            raise ValueError(extracted.faults[str(number)])
        if pictures:
            own[image] = extracted.of_row(number)
        if not (prompted or text_only or chat):
            own["prefix"] = ""
        own |= {name: names[own[name]] for name, names in labels.items() if _is_label(own.get(name), names)}
        if suffix in labels and not isinstance(own.get(suffix, ""), str):
            raise ValueError(f"field {suffix}: {own[suffix]} is not the number of a label")
        rows = list(read(own, number))
        if rows and not rows[0].part_name and outer is None:
            mine = splits.split(split)
            if mine is None:
                return []
            for row in rows:
                row.part, row.part_name = mine.split, mine.name
        return rows

    read_columns = [name for name, feature in features.items() if name in labels or is_plain(feature)]
    if not read_columns:  # a table without columns would have no rows
        problem = f"dataset {data.file}: split {split} has no column of answers; available: {', '.join(features)}"
        raise UserError(problem[:1000], "Set data.file to a table with answers, and data.columns to its columns.")
    return parse, read_columns


def _is_label(value: Any, names: list[str]) -> bool:
    """Whether a value is the number of a label; unlabelled rows have -1 or null."""
    return isinstance(value, int) and 0 <= value < len(names)


def _is_read(data: Data, table: Any, name: str) -> bool:
    feature = table.features[name]
    return name == data.columns.get("image", "image") or type(feature).__name__ == "ClassLabel" or is_plain(feature)


def _is_media(feature: Any) -> bool:
    """Whether a column contains images, audio or video, or lists of them."""
    inner = inner_type(feature)
    return type(feature).__name__ in ("Image", "Audio", "Video") or (inner is not None and _is_media(inner))


def _picture_name(number: int, index: int, count: int) -> str:
    """Return the name of an image's file.

    Args:
        number: of the row.
        index, count: of the image among those of the row, and their number.
    """
    return f"{number:08d}" if count == 1 else f"{number:08d}-{index + 1}"


def _write_pictures(
    rows: Iterable[dict[str, Any]], name: str, folder: Path, inside: Sequence[Path]
) -> tuple[dict[int, str], dict[int, int]]:
    """Write the images of a column unchanged, named by row number.

    Args:
        inside: folders that image files must be in.

    Returns:
        Row number → why the row has no image; row number → number of images, of rows that have none or several.
    """
    faults, counts = {}, {}
    for number, row in enumerate(rows, 1):
        pictures = row[name] if isinstance(row[name], list) else [row[name]]
        try:
            for index, picture in enumerate(pictures):
                target = folder / _picture_name(number, index, len(pictures))
                held = _picture_bytes(picture)
                if isinstance(held, bytes):
                    target.write_bytes(held)
                else:
                    shutil.copyfile(_file_inside(held, inside), target)
        except ValueError as error:
            faults[number] = f"field {name}: {error}"
        if len(pictures) != 1:
            counts[number] = len(pictures)
    return faults, counts


def _picture_bytes(value: Any) -> bytes | str:
    """Return the bytes of an image, or its path.

    Raises:
        ValueError: there is none.
    """
    picture = value if isinstance(value, dict) else {"bytes": value}
    found = picture.get("bytes") or picture.get("path")
    if not isinstance(found, (bytes, str)):
        raise ValueError("contains no image")
    return found


def _file_inside(path: str, inside: Sequence[Path]) -> Path:
    """Return a file of the dataset.

    Args:
        inside: folders of the dataset; relative paths are relative to the first.

    Raises:
        ValueError: there is no such file, or it is elsewhere, also through a link.
    """
    try:
        file = (inside[0] / path).resolve()
        if file.is_file() and any(file.is_relative_to(folder.resolve()) for folder in inside):
            return file
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null character
        pass
    problem = f"{path[:100]!r} is not a file inside the dataset ({inside[0]}), so it is not read"
    raise ValueError(f"{problem}; put the image there, or its bytes into the row")
