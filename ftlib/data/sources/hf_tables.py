"""Read records from the tables of a dataset: of the hub, of a local folder, or written by `save_to_disk`."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core import files, log
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.core.paths import find_site
from ftlib.data.sources.imagefolder import IMAGES
from ftlib.data.split_names import split_from_name, split_from_plain_name
from ftlib.errors import UserError
from ftlib.hub.cache import Repository, cache_name, find_staged, is_local_path

_PLAIN = ("string", "large_string", "bool", "int", "uint", "float", "null")
"""Prefixes of the type names of texts and numbers."""

_OLD_PICTURES = "images"
"""Folder of images of version 0.1: `images/<split>/`, with a marker. Rows prepared then still refer to it."""

_BATCH = 1000
_HEAD = 1 << 16
"""Number of first bytes of a file that are checked."""

_REMEDY = (
    "Use names that `datasets` knows (train, validation, test), or declare them in the folder's README.md "
    "(configs, data_files). Sources jsonl, csv and instructions (data.files) also read text, folder reads classes."
)


@dataclass(frozen=True)
class ParquetSplit:
    """Parquet files of one split, read in place.

    Attributes:
        features: column → type, as in `datasets`.
        num_rows: of all files.
    """

    paths: Sequence[str]
    features: Any
    num_rows: int

    def batches(self, columns: Sequence[str], size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of records of all files, with the given columns.

        Raises:
            ValueError: a file has other columns than the first.
        """
        from datasets import Features
        from datasets.table import cast_table_to_features
        from pyarrow import Table, parquet

        features = Features({name: self.features[name] for name in columns})
        for path in self.paths:
            with parquet.ParquetFile(path) as file:
                if set(file.schema_arrow.names) != self.features.keys():
                    other = sorted(set(file.schema_arrow.names) ^ self.features.keys())
                    raise ValueError(f"{path}: columns differ from the first file of the split: {', '.join(other)}")
                for batch in file.iter_batches(size, columns=list(columns)):
                    table = Table.from_batches([batch]).select(list(columns))
                    yield cast_table_to_features(table, features).to_pylist()


def load_tables(data: Data) -> dict[str, Any]:
    """Return split → table; a single table without a split name has the name "".

    Parquet is read in place; other files are converted in a temporary folder.

    Raises:
        UserError: `datasets` is not installed, the dataset is not in the cache or cannot be read, or `datasets` would
            assign files to the wrong splits.
    """
    name, _, subset = data.file.partition(":")
    if not name:
        raise UserError("data.file: must be the name of the dataset, such as owner/name or owner/name:subset")
    try:
        import datasets
    except ImportError:
        raise UserError("source hub needs `datasets`, which is not installed", "pip install datasets") from None
    datasets.disable_progress_bars()
    local = is_local_path(name)
    folder = _folder(name)
    with _read_errors(data):
        if folder and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            tables = datasets.load_from_disk(str(folder))
            for table in tables.values() if isinstance(tables, dict) else [tables]:
                _require_inside(data, folder, [entry["filename"] for entry in table.cache_files])
        elif folder and folder.is_dir():  # not in $HOME's cache, which several processes would write
            place = _without_old_pictures(data, folder) if local else folder
            builder = datasets.load_dataset_builder(str(place), subset or None, cache_dir=str(_private_folder()))
            found = builder.config.data_files or {}
            _require_inside(data, place, [str(path) for paths in found.values() for path in paths])
            _require_files_in_their_splits(data, place.resolve(), found)
            tables = _parquet_splits(builder)
            if tables is None:
                _refuse_null_records(builder.config.data_files or {})
                builder.download_and_prepare()
                tables = builder.as_dataset()
        else:
            tables = datasets.load_dataset(name, subset or None)
    named = tables if isinstance(tables, dict) else {tables.split or "": tables}
    return {str(split): table for split, table in named.items()}


def _folder(name: str) -> Path | None:
    """Return the folder of a dataset: a local folder, or in the store; None if it is not staged."""
    return (
        Path(name).expanduser() if is_local_path(name) else find_staged(Repository("dataset", name, None), find_site())
    )


def folders_of(data: Data) -> list[Path]:
    """Return the folders with files of a dataset: its folder, the blobs in huggingface_hub's cache, files unpacked by
    `datasets`, and for a local folder `data.root`. If it is not staged: the caches of huggingface_hub and `datasets`.
    """
    import datasets
    from huggingface_hub import constants

    name = data.file.partition(":")[0]
    folder = _folder(name)
    if folder is None:
        cached = Path(constants.HF_HUB_CACHE) / cache_name(Repository("dataset", name, None))
        return [cached, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return [folder, *blobs, *([Path(data.root)] if is_local_path(name) else []), _private_folder()]


def _require_inside(data: Data, folder: Path, paths: Sequence[str]) -> None:
    """Reject a dataset whose README.md or state.json lists files outside of it, which would be read as its rows.

    Raises:
        UserError: a file is outside the dataset's folder.
    """
    place = folder.resolve()
    for path in paths:
        outermost = path.rpartition("::")[2]  # zip://rows.csv::/folder/archive.zip
        file = Path(os.path.normpath(Path.cwd() / outermost))  # links inside the folder are allowed
        if "://" in outermost or not (file.is_relative_to(place) or file.is_relative_to(folder)):
            problem = f"dataset {data.file}: it lists the file {path[:200]}, which is outside of it"
            raise UserError(problem, f"Only files below {folder} are read: correct its README.md or state.json.")


def records(data: Data, table: Any, columns: Sequence[str], size: int = _BATCH) -> Iterator[dict[str, Any]]:
    """Yield the records of a table; images are records of bytes and path, or bytes alone.

    Args:
        columns: the columns to read.
        size: number of records in memory at a time.

    Raises:
        UserError: the table cannot be read.
    """
    with _read_errors(data):
        if isinstance(table, ParquetSplit):
            for batch in table.batches(columns, size):
                yield from batch
            return
        chosen = table.select_columns(list(columns))
        if any(_has_json(feature) for feature in chosen.features.values()):
            yield from chosen
            return
        for batch in chosen.with_format("arrow").iter(batch_size=size):  # thirty times as fast as single rows
            yield from batch.to_pylist()


@contextlib.contextmanager
def _read_errors(data: Data) -> Iterator[None]:
    """Context that turns the exceptions of readers into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        remedy = "Run `ftlib stage CONFIG` on a machine with access to the hub; check data.file."
        raise UserError(f"dataset {data.file}: cannot be read: {reason}", remedy) from None


def _parquet_splits(builder: Any) -> dict[str, ParquetSplit] | None:
    """Return split → files if all are plain Parquet, else None."""
    from datasets import Features
    from pyarrow import parquet

    config = builder.config
    found = {str(split): list(map(str, paths)) for split, paths in (config.data_files or {}).items()}
    chosen = getattr(config, "columns", None) or getattr(config, "filters", None)
    plain = all(path.endswith(".parquet") for paths in found.values() for path in paths)
    kinds = {kind.__name__ for kind in type(builder).__mro__}
    if "Parquet" not in kinds or chosen or not plain or not all(found.values()):
        return None
    tables = {}
    for split, paths in found.items():
        features = builder.info.features or Features.from_arrow_schema(parquet.read_schema(paths[0]))
        tables[split] = ParquetSplit(paths, features, sum(parquet.read_metadata(path).num_rows for path in paths))
    return tables


def _refuse_null_records(found: Mapping[str, Any]) -> None:
    """Reject JSON files with `null` instead of a record: pyarrow 26 crashes if the first record is null.

    Args:
        found: split → paths of its files.

    Raises:
        UserError: a file has such a record.
    """
    for path in (Path(path) for paths in found.values() for path in paths):
        if path.suffix not in (".json", ".jsonl", ".ndjson") or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            nulls = [1] if re.match(rb"(\[\s*)?null\b", head) else []
            if head.partition(b"\n")[0].rstrip().endswith(b"}"):  # a record in each line
                nulls += [number for number, line in enumerate(file, 1) if line.strip() == b"null"]
        if nulls:
            raise UserError(f"{path}:{nulls[0]}: null instead of a record", "Remove it from the file.")


def _require_files_in_their_splits(data: Data, folder: Path, found: Mapping[str, Any]) -> None:
    """Reject files that `datasets` assigns to the wrong split, because it knows fewer split names than ftlib.

    Reports files of other splits that it does not read.

    Args:
        found: split → paths of its files.

    Raises:
        UserError: the name of a file, or of its folder, is that of another split; a file is read for two splits.
    """
    readme = folder / "README.md"
    declared = readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), re.MULTILINE)
    if declared or not data.split.official:
        return
    given = {name for names in data.splits.values() for name in names}
    read: dict[Path, list[str]] = {}
    for split, paths in found.items():
        for path in map(Path, paths):
            read.setdefault(path, []).append(str(split))
    kinds = {path.suffix for path in read}
    wrong, unread = [], []
    for name in _files_below(folder, ()):
        path, splits = folder / name, read.get(folder / name, [])
        folders = Path(name).parts[:-1]
        if path.suffix.lower() in IMAGES:  # folders of images may be classes
            said = split_from_plain_name(folders[0]) if folders else ""
        else:
            said = next(filter(None, map(split_from_name, (path.stem, *folders))), "")
        if not splits:
            unread += [name] if said and path.suffix in kinds else []
        elif len(splits) > 1:
            wrong.append(f"{name} is read as {' and '.join(splits)}")
        elif said in ("valid", "test") and split_from_name(splits[0]) == "train" and splits[0] not in given:
            wrong.append(f"{name} is read as {splits[0]}")
    if unread:
        log.warning(f"dataset {data.file}: not read: {_few(unread)}. {_REMEDY}")
    if wrong:
        raise UserError(f"dataset {data.file}: files of other splits: {_few(wrong)}", _REMEDY)


def _few(names: list[str]) -> str:
    return "; ".join(names[:5]) + ("; …" if len(names) > 5 else "")


def _without_old_pictures(data: Data, folder: Path) -> Path:
    """Return a local folder, or a temporary folder with links to its files if version 0.1 wrote images into it.

    `datasets` would read the image folders, which have names of splits.
    """
    old = (Path(data.root) / _OLD_PICTURES).resolve()
    if not old.is_relative_to(folder.resolve()) or not any(old.glob(f"*/{files.COMPLETE_MARKER}")):
        return folder
    place = Path(tempfile.mkdtemp(dir=_private_folder()))
    for name in files_of(data):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to((folder / name).absolute())
    return place


@functools.cache
def _private_folder() -> Path:
    """Return a temporary folder on local disk that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="ftlib-datasets-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def files_of(data: Data) -> list[str]:
    """Return the sorted relative paths of a local folder's files, without hidden files and ftlib's images."""
    ours = {marker.parent.resolve() for marker in (Path(data.root) / _OLD_PICTURES).glob(f"*/{files.COMPLETE_MARKER}")}
    return _files_below(Path(data.file.partition(":")[0]).expanduser(), ours)


def _files_below(folder: Path, ours: Collection[Path]) -> list[str]:
    """Return relative paths of all files that are not hidden; links to folders are followed once, broken links
    skipped."""
    entered, found = {folder.resolve()}, []
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = {name: (Path(place) / name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, path in inner.items() if path not in ours and path not in entered]
        entered |= {inner[name] for name in folders}
        inside = os.path.relpath(place, folder)
        before = "" if inside == "." else f"{inside}/"
        found += [f"{before}{name}" for name in names if not name.startswith(".") and (Path(place) / name).is_file()]
    return sorted(found)


def inner_type(feature: Any) -> Any:
    """Return the type of a list's elements; None if it is not a list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def is_plain(feature: Any) -> bool:
    """Whether a column contains texts or numbers, or lists or records of them."""
    if isinstance(feature, dict):
        return all(map(is_plain, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(is_plain, feature))
    if hasattr(feature, "feature"):
        return is_plain(feature.feature)
    return _has_json(feature) or str(getattr(feature, "dtype", "")).startswith(_PLAIN)


def _has_json(feature: Any) -> bool:
    """Whether a column contains values of several types, which `datasets` stores as JSON."""
    if isinstance(feature, dict):
        return any(map(_has_json, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_has_json, feature))
    return type(feature).__name__ == "Json" or (hasattr(feature, "feature") and _has_json(feature.feature))
