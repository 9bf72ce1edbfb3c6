"""A dataset of the hub, or a local folder of Parquet, JSON, CSV or images, as `datasets.load_dataset` reads it.

`data.file` is its name, `owner/name` or `owner/name:subset`, or the folder's path. It is taken from the shared cache;
`fetch` brings it there, and writes pictures that are inside of it to `<data.root>/images/<split>/`. Columns are named
in `data.columns`; a dataset without a column of images but with `messages`, or a column for the prompt (`instruction`
or as named), is one of instructions. Columns that are neither texts nor numbers nor lists of such are left out.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib import files as storage
from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.fields import row_parser
from ftlib.data.loaders.instructions import instruction_parser
from ftlib.data.loaders.layout import Part
from ftlib.data.loaders.rows import Numbered, Parse, Reading
from ftlib.errors import UserError
from ftlib.hub import Repository, find_staged, looks_local
from ftlib.out_of_memory import is_out_of_memory
from ftlib.site import find_site

_PARTS: dict[str, Part] = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
}
_PLAIN = ("string", "large_string", "bool", "int", "uint", "float", "null")
"""How the types of texts and numbers begin."""

_ROW = "row of the split"
"""A column of ours: ids in datasets often start anew in each split."""


def files(data: Data) -> list[Path]:
    """There is no annotation file; `examples` reads the shared cache."""
    return []


def version(data: Data) -> list[str]:
    """The commit that is staged; of a local folder its files with their sizes and times."""
    name = data.file.partition(":")[0]
    if looks_local(name):
        found = sorted(path for path in Path(name).rglob("*") if path.is_file())
        facts = ((path, path.stat()) for path in found)
        return [f"{path.relative_to(name)} {fact.st_size} {fact.st_mtime_ns}" for path, fact in facts]
    staged = find_staged(Repository("dataset", name, None), find_site())
    return [staged.name] if staged else []


def examples(data: Data) -> Iterator[Example | Bad]:
    """The rows of all splits; a row's id is `<split>-<row>` unless `data.columns` names a column of ids.

    Raises:
        UserError: `datasets` is not installed, the dataset is not in the cache or cannot be read, no such columns.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # jobs never reach the hub; `datasets` looks when it is imported
    reading = Reading()
    for split, table in _load(data).items():
        parse, wanted = _parser(data, split, table)
        records = enumerate(table.select_columns(wanted), 1)
        yield from reading.rows(Numbered(Path(data.file), f"{split} row"), records, parse)


def fetch(data: Data) -> None:
    """Bring a dataset into the shared cache, and the pictures inside of it into `data.root`.

    Raises:
        UserError: no such dataset, no connection, storage full or read-only.
    """
    name = data.columns.get("image", "image")
    for split, table in _load(data).items():
        target = Path(data.root) / "images" / split
        if _has_pictures(table, name) and not storage.is_complete(target):
            with storage.publish_folder(target) as folder:
                _write_pictures(table.select_columns([name]), name, folder)


def _load(data: Data) -> Any:
    """split → table."""
    name, _, subset = data.file.partition(":")
    if not name:
        raise UserError("data.file: the name of the dataset is needed, such as owner/name or owner/name:subset")
    try:
        import datasets
    except ImportError:
        raise UserError("source hub needs `datasets`, which is not installed", "pip install datasets") from None
    datasets.disable_progress_bars()
    staged = None if looks_local(name) else find_staged(Repository("dataset", name, None), find_site())
    try:
        if staged:  # its tables go to a folder of this process: in a shared one several would write at once
            tables = datasets.load_dataset(str(staged), subset or None, cache_dir=_private_cache())
        else:
            tables = datasets.load_dataset(name, subset or None)
    except Exception as error:  # whatever the readers of its files raise
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        remedy = "Run `ftlib stage CONFIG` on a machine that reaches the hub; check data.file."
        raise UserError(f"dataset {data.file}: cannot be read: {reason}", remedy) from None
    return tables


@functools.cache
def _private_cache() -> str:
    """A temporary folder on local disk that goes with this process."""
    folder = tempfile.mkdtemp(prefix="ftlib-datasets-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _has_pictures(table: Any, name: str) -> bool:
    """Whether a column holds pictures, not their names."""
    return type(table.features.get(name)).__name__ == "Image"


def _parser(data: Data, split: str, table: Any) -> tuple[Parse, list[str]]:
    """What reads the rows of a split, and the columns that it needs."""
    features = table.features
    columns: dict[Any, str] = {"id": _ROW} | dict(data.columns)
    image = columns.get("image", "image")
    missing = sorted(name for name in data.columns.values() if name not in features)
    text_only = image not in features and ("messages" in features or columns.get("prefix", "instruction") in features)
    if missing or (image not in features and not text_only):
        problem = f"dataset {data.file}: split {split} has no column {', '.join(missing or [image])}"
        raise UserError(f"{problem}; there are: {', '.join(features)}"[:1000], "Name the columns in data.columns.")
    read = instruction_parser(columns) if text_only else row_parser(columns)
    labels = {name: feature.names for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    prompted = columns.get("prefix", "prefix") in features
    pictures = _has_pictures(table, image)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        own: dict[str, Any] = {_ROW: f"{split}-{number}"} if columns["id"] == _ROW else {}
        own |= {name: value for name, value in record.items() if value is not None}  # null: no such field in this row
        if pictures:
            own[image] = f"images/{split}/{_picture_name(number)}"
        if not (prompted or text_only):
            own["prefix"] = ""
        own |= {name: names[own[name]] for name, names in labels.items() if _is_label(own.get(name), names)}
        return [replace(row, part=_PARTS.get(split, "")) for row in read(own, number)]

    return parse, [name for name, feature in features.items() if name in labels or _is_plain(feature)]


def _is_label(value: Any, names: list[str]) -> bool:
    """Whether a value is the number of a label; unlabelled rows have -1 or nothing."""
    return isinstance(value, int) and 0 <= value < len(names)


def _is_plain(feature: Any) -> bool:
    """Whether a column holds texts or numbers, or lists or records of them."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(_is_plain, feature))
    if hasattr(feature, "feature"):
        return _is_plain(feature.feature)
    return str(getattr(feature, "dtype", "")).startswith(_PLAIN)


def _picture_name(number: int) -> str:
    return f"{number:08d}"


def _write_pictures(table: Any, name: str, folder: Path) -> None:
    """Write the pictures of a column as they are, under their rows' numbers; rows without one get no file."""
    from datasets import Image

    for number, row in enumerate(table.cast_column(name, Image(decode=False)), 1):
        picture = row[name] or {}
        target = folder / _picture_name(number)
        if picture.get("bytes"):
            target.write_bytes(picture["bytes"])
        elif picture.get("path") and Path(picture["path"]).is_file():
            shutil.copyfile(picture["path"], target)
