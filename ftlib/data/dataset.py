"""A prepared dataset: validated, split and fingerprinted rows in the store.

`<store>/prepared/<source>-<key>/` is a `datasets.DatasetDict` of train, valid and test; with bad.json (skipped
records) and data.json beside
it. The key is the hash of the task (which defines what an invalid row is), of the config's data section (without the
prompt, which is applied when rows are read) and of the annotation files; `data.root` is part of it only if it is in the
store. Data prepared from another folder count as the same if a sample of their images is equal. A replaced image is
detected when it is opened: every row has the digest of its image.
"""

from __future__ import annotations

import json
import mmap
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ftlib.config.identity import canonical_fields
from ftlib.config.paths import map_paths, stored_text
from ftlib.config.schema import Config, Data
from ftlib.core import files
from ftlib.core.hashes import hash_files
from ftlib.core.paths import STORE, Site, stored_path
from ftlib.core.registry import provider
from ftlib.data.example import Example, raise_all
from ftlib.data.images import image_path
from ftlib.data.prompts import BUILTIN_TEMPLATES, hides_context, prompt_checker, template_fields
from ftlib.data.sources.registry import TOY_DATASETS, annotation_files, content_version
from ftlib.data.splits import SPLITS
from ftlib.errors import UserError
from ftlib.runs.pinning import same_rows
from ftlib.runs.run import Run

if TYPE_CHECKING:
    import pyarrow


BATCH = 1000
"""Rows per record batch, which is read as a whole."""
_BATCH_CHARACTERS = 1 << 24

Spool = Path
"""An Arrow stream written by `RowWriter`: rows before they are split."""


def schema(several_images: bool = True) -> pyarrow.Schema:
    """Return the columns of a row; `Example` documents them.

    Args:
        several_images: whether rows have several images; the columns of the others are omitted otherwise.
    """
    import pyarrow

    text = pyarrow.string()
    kinds = dict.fromkeys(("references", *_OTHERS), pyarrow.list_(text)) | {"frame": pyarrow.int32()}
    names = COLUMNS if several_images else COLUMNS[: -len(_OTHERS)]
    return pyarrow.schema([(name, kinds.get(name, text)) for name in names])


_OTHERS = ("other_images", "other_digests")
COLUMNS = (
    *("id", "image", "prefix", "suffix", "references", "facts", "part", "group", "frame", "digest", "dataset"),
    *_OTHERS,
)
"""In the order of the fields of `Example`."""

_FACTS = COLUMNS.index("facts")


_EMPTY: tuple[Any, ...] = ("", "", "", "", (), None, "", "", 0, "", "", (), ())
_from_json = json.JSONDecoder().raw_decode


def _example(values: list[Any]) -> Example:
    """Return a row from its values, in the order of `COLUMNS`."""
    facts = values[_FACTS]
    values[_FACTS] = _from_json(facts)[0] if facts else {}
    return Example(*values)


class _MappedRows(Sequence[Example]):
    """Memory-mapped rows; each process opens the file itself. Slices are lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._row(number) for number in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _row(self, number: int) -> Example: ...


class SplitRows(_MappedRows):
    """The rows of a split's folder, or of a spool.

    Only columns that are not all null in a batch are read, which is faster than table readers.
    """

    def __len__(self) -> int:
        return self._starts[-1]

    def _row(self, number: int) -> Example:
        batch = bisect_right(self._starts, number) - 1
        inside = number - self._starts[batch]
        values = list(_EMPTY)
        for column, read in self._columns[batch] or self._column(batch):
            value = read(inside)
            if value is not None:
                values[column] = value
        return _example(values)

    def __iter__(self) -> Iterator[Example]:
        for batch in range(len(self._batches)):
            places = [index for index, _ in self._columns[batch] or self._column(batch)]
            columns = [self._batches[batch].column(COLUMNS[index]).to_pylist() for index in places]
            for found in zip(*columns, strict=True):
                values = list(_EMPTY)
                for index, value in zip(places, found, strict=True):
                    if value is not None:
                        values[index] = value
                yield _example(values)

    @property
    def batches(self) -> list[pyarrow.RecordBatch]:
        """Return the rows as record batches, with the columns of `schema`."""
        return self._batches

    def _open(self) -> None:
        import pyarrow

        paths = [self.path]
        if self.path.is_dir():  # as `datasets` saves it, whose import would take half a second
            paths = [
                self.path / entry["filename"] for entry in files.read_json(self.path / "state.json")["_data_files"]
            ]
        streams = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) for path in paths]
        self._batches = [batch for stream in streams for batch in stream if len(batch)]
        self._starts = np.cumsum([0, *map(len, self._batches)]).tolist()
        self._columns: list[list[_Column]] = [[] for _ in self._batches]

    def _column(self, batch: int) -> list[_Column]:
        """Return the columns of a batch that are not all null."""
        table = self._batches[batch]
        there = set(table.schema.names)
        columns = ((index, table.column(name)) for index, name in enumerate(COLUMNS) if name in there)
        self._columns[batch] = [(index, _reader(column)) for index, column in columns if column.null_count < len(table)]
        return self._columns[batch]


_Column = tuple[int, Callable[[int], Any]]
"""A column's index in `COLUMNS`, and a function: row number in the batch → value."""


def _reader(column: pyarrow.Array) -> Callable[[int], Any]:
    """Return a function that reads single values; strings directly from Arrow's buffers, because scalar objects are
    slow.

    Source: https://arrow.apache.org/docs/format/Columnar.html, "Variable-size Binary Layout".
    """
    if str(column.type) != "string" or column.null_count:
        return lambda index: column[index].as_py()
    _, offsets, data = column.buffers()
    ends, text = memoryview(offsets).cast("i")[column.offset :], memoryview(data or b"")
    return lambda index: str(text[ends[index] : ends[index + 1]], "utf-8")


def read_batches(spool: Spool) -> Iterator[pyarrow.RecordBatch]:
    """Yield the record batches of a spool; none stays in memory, unlike the pages of a mapped file."""
    import pyarrow

    with pyarrow.OSFile(str(spool)) as file, pyarrow.ipc.open_stream(file) as batches:
        yield from (batch for batch in batches if len(batch))


class JsonlRows(_MappedRows):
    """Rows of a folder of format 3: JSONL with a file of line offsets."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _row(self, number: int) -> Example:
        return Example(**json.loads(self._bytes[self._offsets[number] : self._offsets[number + 1]]))

    def _open(self) -> None:
        self._offsets = np.load(self.path.with_suffix(".offsets.npy"), mmap_mode="r")
        with self.path.open("rb") as file:  # an empty file cannot be mapped
            self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""


class RowWriter:
    """Writes a spool, which `SplitRows` reads, to a file or to memory."""

    def __init__(self, sink: Path | pyarrow.NativeFile, several_images: bool = True) -> None:
        """
        Args:
            several_images: see `schema`.
        """
        import pyarrow

        self._schema = schema(several_images)
        self._writer = pyarrow.ipc.new_stream(str(sink) if isinstance(sink, Path) else sink, self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._count = self._characters = 0

    def __len__(self) -> int:
        return self._count

    def write(self, row: Example, facts: str | None) -> None:
        """Add a row, with its facts as JSON."""
        self._rows.append(
            (
                row.id or None,
                row.image or None,
                row.prefix,
                row.suffix,
                row.references or None,
                facts,
                row.part or None,
                row.group or None,
                row.frame or None,
                row.digest or None,
                row.dataset or None,
                row.other_images or None,
                row.other_digests or None,
            )[: len(self._schema)]
        )
        self._count += 1
        self._characters += len(row.prefix) + len(row.suffix) + len(facts or "")
        if len(self._rows) == BATCH or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def write_batch(self, rows: pyarrow.RecordBatch) -> None:
        """Add rows of another spool."""
        if len(rows):
            self._flush()
            self._writer.write_batch(rows.select(self._schema.names))
            self._count += len(rows)

    def write_stream(self, rows: bytes) -> None:
        """Add the rows of a spool in memory."""
        import pyarrow

        for batch in pyarrow.ipc.open_stream(rows):
            self.write_batch(batch)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pyarrow.array(values, each.type) for values, each in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows = []
        self._characters = 0


FORMAT = 4
_READABLE = range(3, FORMAT + 1)
"""Older formats that existing runs may still use."""
_SAMPLED_IMAGES = 20
"""Approximate number of images per split that are compared to see whether another folder has the same images."""

_CHECK_ROOT_HINT = "Check data.root and data.file; relative paths count from the config's folder."


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset.

    Attributes:
        folder: its folder in the store.
        root: the folder to which image paths are relative.
        metadata: content of data.json: source, fingerprint and number of rows per split, labels, skipped records.
    """

    folder: Path
    root: Path
    metadata: dict[str, Any]

    def rows(self, split: str) -> Sequence[Example]:
        """Return the rows of a split."""
        return (
            SplitRows(self.folder / split)
            if (self.folder / split).is_dir()
            else JsonlRows(self.folder / f"{split}.jsonl")
        )

    def require_rows(self, splits: Sequence[str]) -> None:
        """Check that splits are not empty.

        Raises:
            UserError: a split has no rows.
        """
        for split in splits:
            if not self.metadata["splits"][split]["rows"]:
                remedy = f"Remove {split} from evaluation.splits, or set data.split.{split}."
                raise UserError(f"split {split} has no rows", remedy)

    def counts(self, split: str, indices: Sequence[int]) -> list[int]:
        """Return how many of the given rows belong to each dataset of a mixture; without a mixture, one number.

        Args:
            indices: of the rows, ascending.
        """
        entry = self.metadata["splits"][split]
        ends = list(accumulate(entry.get("parts", {"": entry["rows"]}).values()))
        found = [bisect_left(indices, end) for end in ends]
        return [end - start for start, end in zip([0, *found], found, strict=False)]

    @property
    def labels(self) -> list[str]:
        """Return all answers, sorted; empty if there are too many for a closed set."""
        return list(self.metadata["labels"] or ())


def prepared_folder(config: Config, site: Site) -> Path:
    """Return the folder of a config's prepared dataset; it may not exist yet.

    Raises:
        UserError: the annotation file is missing.
    """
    by_content, by_path = possible_folders(config, site)
    found = [folder for folder in (by_content, by_path) if files.is_complete(folder)]
    for folder in found:
        if _same_images(read_prepared(folder, config), config, site):
            return _latest_version_folder(folder, config)
    return by_path if by_content in found else by_content


def _latest_version_folder(folder: Path, config: Config) -> Path:
    """Return the folder of the newest version of the data.

    A new version is made on request, or if skipped rows have become usable: their images were repaired, or the prompt
    has changed.
    """
    while files.is_complete(folder):
        following = following_folder(folder)
        asked_for = files.is_complete(following) and files.read_json(following / "data.json").get("again")
        if not (asked_for or _images_repaired(folder, config) or _skipped_for_prompt(folder, config)):
            return folder
        folder = following
    return folder


def following_folder(folder: Path) -> Path:
    """Return the folder of the next version of the same data: `<source>-<key>-2`, -3, …"""
    source, key, number = f"{folder.name}-1".split("-")[:3]
    return folder.with_name(f"{source}-{key}-{int(number) + 1}")


def _images_repaired(folder: Path, config: Config) -> bool:
    """Whether images that could not be used have changed or appeared since."""
    missed = files.read_json(folder / "bad.json").get("images", {})
    return any(file_stat(image_path(Path(config.data.root), name)) != state for name, state in missed.items())


def _skipped_for_prompt(folder: Path, config: Config) -> bool:
    """Whether rows were skipped because of a prompt that differs from the config's."""
    facts = files.read_json(folder / "data.json")
    return bool(facts.get("unasked")) and facts["prompts"] != config.data.templates


def file_stat(path: Path) -> list[int] | None:
    """Return size and modification time of a file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def possible_folders(config: Config, site: Site) -> tuple[Path, Path]:
    """Return the two possible folders of a config's prepared dataset: named by content, or by the path of its root.

    The latter (used by version 0.1) is for a second dataset with the same annotation files and other images.

    Raises:
        UserError: the annotation file is missing.
    """
    data = config.data
    without = {"Data": ("prompt",), "Part": ("prompt", "weight")}  # prompts are applied when rows are read
    rule = canonical_fields(data, without)
    movable = canonical_fields(
        map_paths(data, lambda key, text, kind: stored_text(text, kind, Path("/"), site.store)), without
    )
    if not movable["root"].startswith(STORE):
        del movable["root"]
    contents = source_contents(config)
    keys = [files.json_sha256([FORMAT, config.task, each, contents])[:12] for each in (movable, rule)]
    by_content, by_path = (site.store / "prepared" / f"{data.source}-{key}" for key in keys)
    return by_content, by_path


def _same_images(prepared: PreparedDataset, config: Config, site: Site) -> bool:
    """Whether the config's root has the same images as the root that the data were prepared from; checks a sample."""
    known, root = prepared.metadata.get("root"), Path(config.data.root)
    if known in (None, stored_path(root, site.store)):  # without a recorded root, the path is part of the folder's key
        return True
    sample = prepared.metadata.get("sample")
    if sample is None:  # format 3
        sample = [pair for split in SPLITS for pair in image_sample(prepared.rows(split))]
    paths = ((image_path(root, name), digest) for name, digest in sample)
    return all(path.is_file() and files.file_sha256(path) == digest for path, digest in paths)


def image_sample(rows: Sequence[Example]) -> list[tuple[str, str]]:
    """Return name and digest of a sample of the images of a split."""
    found = (rows[index] for index in range(0, len(rows), max(1, len(rows) // _SAMPLED_IMAGES)))
    return [(name, digest) for row in found for name, _, digest in row.image_files]


def source_contents(config: Config) -> list[Any]:
    """Return a JSON value that identifies the content of a config's dataset."""
    plugins = [provider("task", config.task, config.plugins), *config.data.source_plugins]
    read = sorted({plugin.identity for plugin in plugins if plugin})
    contents = [_content(part) for part in config.data.datasets.values()]
    return [*contents, *_mask_codec_content(config), *([{"plugins": read}] if read else [])]


def _content(data: Data) -> list[str]:
    """Return what identifies a dataset's content: hashes of annotation files, its version, or the names of all
    files."""
    sources = annotation_files(data)
    for source in sources:
        if not source.is_file():
            remedy = "Run `ftlib stage CONFIG` first." if data.source in TOY_DATASETS else _CHECK_ROOT_HINT
            raise UserError(f"{source}: no such file", remedy)
    return [files.file_sha256(source) for source in sources] or content_version(data) or _listing(Path(data.root))


def _mask_codec_content(config: Config) -> list[str]:
    """Return the hash of the mask decoder's weights, if the config uses them."""
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return []
    path = Path(config.evaluation.mask_decoder)
    if not path.is_file():
        raise UserError(f"evaluation.mask_decoder: {path}: no such file")
    return [files.file_sha256(path)]


def _listing(root: Path) -> list[str]:
    """Return the file names of a dataset without annotation files; bytes that are not UTF-8 are escaped."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return [name.encode(errors="backslashreplace").decode() for name in found]


def open_prepared(config: Config, site: Site, run: Run | None = None) -> PreparedDataset:
    """Return the prepared dataset of a config; see `find_prepared`.

    Raises:
        UserError: it is not prepared; it was prepared with another prompt, and the config's prompt does not work for
            all rows; its files have changed.
    """
    found = find_prepared(config, site, run)
    if found is None:
        folder = prepared_folder(config, site)
        raise UserError(f"the dataset of this config is not prepared ({folder})", "Run `ftlib prepare CONFIG` first.")
    _require_unchanged(found.folder, site)
    check_prompts(found, config)
    return found


def _require_unchanged(folder: Path, site: Site) -> None:
    """Check that prepared files were not changed; see `hashes.hash_files` for when they are read again.

    Raises:
        UserError: a file's content has changed.
    """
    written = files.read_json(folder / files.COMPLETE_MARKER)
    for name, digest in hash_files(folder, list(written), site).items():
        if digest != written[name]["sha256"]:
            problem = f"{folder / name}: prepared rows have been modified since they were written"
            again = "Or `ftlib prepare CONFIG --again`, and train under another name."
            raise UserError(
                problem, f"Restore the old file, or remove {folder} and run `ftlib prepare CONFIG`. {again}"
            )


def find_prepared(config: Config, site: Site, run: Run | None = None) -> PreparedDataset | None:
    """Return the prepared dataset of a config; None if it is not prepared.

    Args:
        run: a run keeps the prepared data that it started with while they exist.

    Raises:
        UserError: the annotation file is missing.
    """
    if run and (found := _prepared_for_run(run, config, site)):
        return found
    folder = prepared_folder(config, site)
    return read_prepared(folder, config) if files.is_complete(folder) else None


def read_prepared(folder: Path, config: Config) -> PreparedDataset:
    return PreparedDataset(folder=folder, root=Path(config.data.root), metadata=files.read_json(folder / "data.json"))


def _prepared_for_run(run: Run, config: Config, site: Site) -> PreparedDataset | None:
    """Return the prepared data that a run recorded; if it did not record the folder, any with the same rows."""
    if not run.data.exists():
        return None
    noted = files.read_json(run.data)
    folder_name = noted.get("prepared")
    within = site.store / "prepared"
    for folder in [within / folder_name] if folder_name else sorted(within.glob(f"{noted['source']}-*")):
        if files.is_complete(folder):
            found = read_prepared(folder, config)
            if found.metadata.get("format", 3) in _READABLE and same_rows(found.metadata, noted):
                return found
    return None


def same_data(run: Run, config: Config, site: Site) -> bool:
    """Whether a config's data equal those that a run recorded: annotation files, splits and images, at any path.

    Raises:
        UserError: the annotation file is missing.
    """
    made = _prepared_for_run(run, config, site)
    if made and {"root", "content"} <= made.metadata.keys() and not source_changed(made, config):
        return _same_images(made, config, site)
    found = find_prepared(config, site)
    return found is not None and same_rows(found.metadata, files.read_json(run.data))


def source_changed(prepared: PreparedDataset, config: Config) -> bool:
    """Whether the annotation files have changed since the dataset was prepared; False if that is not recorded."""
    return prepared.metadata.get("content") not in (None, files.json_sha256(source_contents(config)))


def _shows_prefix(template: str) -> bool:
    return template not in BUILTIN_TEMPLATES and "prefix" in template_fields(template)


def check_prompts(prepared: PreparedDataset, config: Config) -> int:
    """Check a config's prompts on every row if the data were prepared with other prompts (unknown with format 3).

    Returns:
        The number of rows whose input the prompt does not show.

    Raises:
        UserError: the prompts do not work for some rows.
    """
    templates = config.data.templates
    if prepared.metadata.get("prompts", templates) == templates:
        return int(prepared.metadata.get("unshown", 0))
    fault = {name: prompt_checker(template) for name, template in templates.items()}
    before = {name: _shows_prefix(template) for name, template in prepared.metadata["prompts"].items()}
    lacking = {name for name, template in templates.items() if _shows_prefix(template) and not before.get(name)}
    faults, unshown = [], 0
    for row in (row for split in SPLITS for row in prepared.rows(split)):
        missing = "field prefix: is empty or missing" if row.dataset in lacking and not row.prefix else ""
        if reason := missing or fault[row.dataset](row):
            faults.append(f"row {row.id} ({row.prefix[:60]!r}): {reason}")
        unshown += hides_context(templates[row.dataset], row)
    again = "; or skip them: ftlib prepare CONFIG --again" if config.data.on_bad == "skip" else ""
    raise_all(faults, f"Set another data.prompt, or fix these records{again}.")
    return unshown


_UNFINISHED_SECONDS = 24 * 3600
"""Older unfinished files were left by a killed process."""


def lengths_folder(site: Site) -> Path:
    """Return the folder of cached row lengths, see `models/lengths.py`."""
    return site.store / "lengths"


def rows_hash(prepared: Path, split: str) -> str:
    """Return the prefix of the names of the files with the lengths of a split's rows."""
    marker = files.read_json(prepared / files.COMPLETE_MARKER)
    rows = {name: entry["sha256"] for name, entry in marker.items() if name.startswith((f"{split}/", f"{split}."))}
    return files.json_sha256(rows)[:16]


def unused_lengths(site: Site, now: float) -> Iterator[Path]:
    """Yield length files of deleted prepared data, of older versions of ftlib, and of killed processes.

    Args:
        now: seconds since 1970, by the storage's clock.
    """
    prepared = [marker.parent for marker in (site.store / "prepared").glob(f"*/{files.COMPLETE_MARKER}")]
    used = {rows_hash(folder, split) for folder in prepared for split in SPLITS}
    for path in sorted(lengths_folder(site).glob("*")):
        if path.name.startswith(files.TEMPORARY_PREFIX):
            unused = now - path.lstat().st_mtime > _UNFINISHED_SECONDS
        else:
            unused = path.suffix == ".npy" and path.stem.partition("-")[0] not in used
        if unused:
            yield path
