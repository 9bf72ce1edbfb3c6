"""A prepared dataset: checked, split, fingerprinted rows in the store.

`<store>/prepared/<source>-<key>/` is a `datasets.DatasetDict` of train, valid and test; bad.json (records that are left
out) and data.json lie beside it. The key is the hash of the task (which says what a faulty row is), of the config's
data section (but for the prompt, which is applied when rows are read) and of the annotation files; `data.root` enters
it where that is below the store. Data that were prepared from elsewhere are the same if some of their images are.
Images that are replaced in place are noticed where they are opened: every row has the digest of its own.
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
"""Rows of a record batch; what lies in one is read together."""
_BATCH_CHARACTERS = 1 << 24

Spool = Path
"""An Arrow stream that `RowWriter` writes: rows before they are divided."""


def schema() -> pyarrow.Schema:
    """The columns of a row; `Example` says what they hold."""
    import pyarrow

    text = pyarrow.string()
    kinds = {"references": pyarrow.list_(text), "frame": pyarrow.int32()}
    return pyarrow.schema([(name, kinds.get(name, text)) for name in COLUMNS])


COLUMNS = ("id", "image", "prefix", "suffix", "references", "facts", "part", "group", "frame", "digest", "dataset")
"""In the order of the fields of `Example`."""

_FACTS = COLUMNS.index("facts")


_EMPTY: tuple[Any, ...] = ("", "", "", "", (), None, "", "", 0, "", "")
_from_json = json.JSONDecoder().raw_decode


def _example(values: list[Any]) -> Example:
    """A row from its values, in the order of `COLUMNS`."""
    facts = values[_FACTS]
    values[_FACTS] = _from_json(facts)[0] if facts else {}
    return Example(*values)


class _MappedRows(Sequence[Example]):
    """Rows that are read where they lie; another process opens them for itself. Slices are lists."""

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

    A row is put together from the columns that its batch has anything in, which is faster than any reader of tables.
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
        """The rows as record batches, with the columns of `COLUMNS`."""
        return self._batches

    def _open(self) -> None:
        if self.path.is_dir():
            from datasets import load_from_disk

            table = load_from_disk(str(self.path)).data.table
        else:
            import pyarrow

            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.path))).read_all()
        self._batches = [batch for batch in table.to_batches() if len(batch)]
        self._starts = np.cumsum([0, *map(len, self._batches)]).tolist()
        self._columns: list[list[_Column]] = [[] for _ in self._batches]

    def _column(self, batch: int) -> list[_Column]:
        """The columns of a batch that are not all null."""
        table = self._batches[batch]
        columns = ((index, table.column(name)) for index, name in enumerate(COLUMNS))
        self._columns[batch] = [(index, _reader(column)) for index, column in columns if column.null_count < len(table)]
        return self._columns[batch]


_Column = tuple[int, Callable[[int], Any]]
"""A column's place in `COLUMNS`, and what gives its value in a row of the batch."""


def _reader(column: pyarrow.Array) -> Callable[[int], Any]:
    """What reads single values; texts straight from Arrow's buffers, since a scalar object takes longer than the text.

    Source: https://arrow.apache.org/docs/format/Columnar.html, "Variable-size Binary Layout".
    """
    if str(column.type) != "string" or column.null_count:
        return lambda index: column[index].as_py()
    _, offsets, data = column.buffers()
    ends, text = memoryview(offsets).cast("i")[column.offset :], memoryview(data or b"")
    return lambda index: str(text[ends[index] : ends[index + 1]], "utf-8")


def read_batches(spool: Spool) -> Iterator[pyarrow.RecordBatch]:
    """The record batches of a spool one after the other; none stays in memory, as pages of a mapped file do."""
    import pyarrow

    with pyarrow.OSFile(str(spool)) as file, pyarrow.ipc.open_stream(file) as batches:
        yield from (batch for batch in batches if len(batch))


class JsonlRows(_MappedRows):
    """Rows of a folder of format 3: JSONL, and beside it where each line begins."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _row(self, number: int) -> Example:
        return Example(**json.loads(self._bytes[self._offsets[number] : self._offsets[number + 1]]))

    def _open(self) -> None:
        self._offsets = np.load(self.path.with_suffix(".offsets.npy"), mmap_mode="r")
        with self.path.open("rb") as file:  # an empty file cannot be mapped
            self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""


class RowWriter:
    """Writes a spool that `SplitRows` reads, to a file or to memory."""

    def __init__(self, sink: Path | pyarrow.NativeFile) -> None:
        import pyarrow

        self._schema = schema()
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
            )
        )
        self._count += 1
        self._characters += len(row.prefix) + len(row.suffix) + len(facts or "")
        if len(self._rows) == BATCH or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def write_batch(self, rows: pyarrow.RecordBatch) -> None:
        """Add rows of another spool."""
        if len(rows):
            self._flush()
            self._writer.write_batch(rows)
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
"""Formats of what is used as it is, where a run was made from it."""
_SAMPLED_IMAGES = 20
"""Images of each split, roughly, that tell whether a folder elsewhere holds the same ones."""

_CHECK_ROOT_HINT = "Check data.root and data.file; relative paths count from the config's folder."


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset.

    Attributes:
        folder: where it lies.
        root: what the images' paths are relative to.
        metadata: data.json: source, fingerprint and number of rows per split, labels, what was left out.
    """

    folder: Path
    root: Path
    metadata: dict[str, Any]

    def rows(self, split: str) -> Sequence[Example]:
        """The rows of a split."""
        return (
            SplitRows(self.folder / split)
            if (self.folder / split).is_dir()
            else JsonlRows(self.folder / f"{split}.jsonl")
        )

    def require_rows(self, splits: Sequence[str]) -> None:
        """Refuse to ask what is empty.

        Raises:
            UserError: a split without rows.
        """
        for split in splits:
            if not self.metadata["splits"][split]["rows"]:
                remedy = f"Leave {split} out of evaluation.splits, or set data.split.{split}."
                raise UserError(f"split {split} has no rows to ask", remedy)

    def counts(self, split: str, indices: Sequence[int]) -> list[int]:
        """How many of some rows of a split each dataset of a mixture has; all of them, if it is none.

        Args:
            indices: of the rows, ascending.
        """
        entry = self.metadata["splits"][split]
        ends = list(accumulate(entry.get("parts", {"": entry["rows"]}).values()))
        found = [bisect_left(indices, end) for end in ends]
        return [end - start for start, end in zip([0, *found], found, strict=False)]

    @property
    def labels(self) -> list[str]:
        """Every answer that occurs, sorted; none if there are too many for a closed set."""
        return list(self.metadata["labels"] or ())


def prepared_folder(config: Config, site: Site) -> Path:
    """Where the prepared form of a config's dataset lies, or would lie.

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
    """Where data lie that were prepared anew: somebody asked for it, or what was left out of them then can be used now.

    These are rows whose images have been mended since, or that another prompt could not ask.
    """
    while files.is_complete(folder):
        following = following_folder(folder)
        asked_for = files.is_complete(following) and files.read_json(following / "data.json").get("again")
        if not (asked_for or _images_repaired(folder, config) or _skipped_for_prompt(folder, config)):
            return folder
        folder = following
    return folder


def following_folder(folder: Path) -> Path:
    """Where the same data lie when they are prepared once more: `<source>-<key>-2`, -3, …"""
    source, key, number = f"{folder.name}-1".split("-")[:3]
    return folder.with_name(f"{source}-{key}-{int(number) + 1}")


def _images_repaired(folder: Path, config: Config) -> bool:
    """Whether images that could not be used are other files now, or there at last."""
    missed = files.read_json(folder / "bad.json").get("images", {})
    return any(file_stat(image_path(Path(config.data.root), name)) != state for name, state in missed.items())


def _skipped_for_prompt(folder: Path, config: Config) -> bool:
    """Whether rows were left out because of another prompt than the config's."""
    facts = files.read_json(folder / "data.json")
    return bool(facts.get("unasked")) and facts["prompts"] != config.data.templates


def file_stat(path: Path) -> list[int] | None:
    """Size and time of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def possible_folders(config: Config, site: Site) -> tuple[Path, Path]:
    """Where the prepared form of a config's dataset may lie: by its content, or by its root's path.

    The latter, as in version 0.1, is for a second dataset with the same annotation files and other images.

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
    """Whether a root that is not the one that data were prepared from shows the same pictures; some are looked at."""
    known, root = prepared.metadata.get("root"), Path(config.data.root)
    if known in (None, stored_path(root, site.store)):  # without it, the folder's name knows the path
        return True
    sample = prepared.metadata.get("sample")
    if sample is None:  # format 3
        sample = [pair for split in SPLITS for pair in image_sample(prepared.rows(split))]
    paths = ((image_path(root, name), digest) for name, digest in sample)
    return all(path.is_file() and files.file_sha256(path) == digest for path, digest in paths)


def image_sample(rows: Sequence[Example]) -> list[tuple[str, str]]:
    """Name and digest of some images of a split."""
    found = (rows[index] for index in range(0, len(rows), max(1, len(rows) // _SAMPLED_IMAGES)))
    return [(row.image, row.digest) for row in found if row.image]


def source_contents(config: Config) -> list[Any]:
    """What tells whether the rows of a config's dataset are the same."""
    plugins = [provider("task", config.task, config.plugins), *config.data.source_plugins]
    read = sorted({plugin.identity for plugin in plugins if plugin})
    contents = [_content(part) for part in config.data.datasets.values()]
    return [*contents, *_mask_codec_content(config), *([{"plugins": read}] if read else [])]


def _content(data: Data) -> list[str]:
    """What tells whether a dataset's rows are the same: annotation files, or its version, or the names of all files."""
    sources = annotation_files(data)
    for source in sources:
        if not source.is_file():
            remedy = "Run `ftlib stage CONFIG` first." if data.source in TOY_DATASETS else _CHECK_ROOT_HINT
            raise UserError(f"{source}: no such file", remedy)
    return [files.file_sha256(source) for source in sources] or content_version(data) or _listing(Path(data.root))


def _mask_codec_content(config: Config) -> list[str]:
    """The weights that mask codes are made with, where they are."""
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return []
    path = Path(config.evaluation.mask_decoder)
    if not path.is_file():
        raise UserError(f"evaluation.mask_decoder: {path}: no such file")
    return [files.file_sha256(path)]


def _listing(root: Path) -> list[str]:
    """What a dataset without annotation files consists of; bytes of names that are not UTF-8 are written as escapes."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return [name.encode(errors="backslashreplace").decode() for name in found]


def open_prepared(config: Config, site: Site, run: Run | None = None) -> PreparedDataset:
    """The prepared form of a config's dataset; see `find_prepared`.

    Raises:
        UserError: it has not been prepared, or with another prompt, and the config's cannot ask all of its rows; its
            files have been changed since.
    """
    found = find_prepared(config, site, run)
    if found is None:
        folder = prepared_folder(config, site)
        raise UserError(f"the dataset of this config is not prepared ({folder})", "Run `ftlib prepare CONFIG` first.")
    _require_unchanged(found.folder, site)
    check_prompts(found, config)
    return found


def _require_unchanged(folder: Path, site: Site) -> None:
    """Refuse prepared rows that were changed in place; see `hashes.hash_files` for when they are read for that.

    Raises:
        UserError: a file's content is not what was prepared.
    """
    written = files.read_json(folder / files.COMPLETE_MARKER)
    for name, digest in hash_files(folder, list(written), site).items():
        if digest != written[name]["sha256"]:
            problem = f"{folder / name}: prepared rows that were changed since they were written"
            again = "Or `ftlib prepare CONFIG --again`, and train under another name."
            raise UserError(
                problem, f"Put the old file back, or remove {folder} and run `ftlib prepare CONFIG`. {again}"
            )


def find_prepared(config: Config, site: Site, run: Run | None = None) -> PreparedDataset | None:
    """The prepared form of a config's dataset; None before it is prepared.

    Args:
        run: goes on with what it was made from while that exists, whatever new data of its config would be called.

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
    """The prepared data that a run noted, or, of a run that did not note their place, any with the same rows."""
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
    """Whether a config's data, wherever they lie, are those that a run noted: annotation files, splits and images.

    Raises:
        UserError: the annotation file is missing.
    """
    made = _prepared_for_run(run, config, site)
    if made and {"root", "content"} <= made.metadata.keys() and not source_changed(made, config):
        return _same_images(made, config, site)
    found = find_prepared(config, site)
    return found is not None and same_rows(found.metadata, files.read_json(run.data))


def source_changed(prepared: PreparedDataset, config: Config) -> bool:
    """Whether a dataset's annotation files are others than those that it was prepared from, as far as that is known."""
    return prepared.metadata.get("content") not in (None, files.json_sha256(source_contents(config)))


def _shows_prefix(template: str) -> bool:
    return template not in BUILTIN_TEMPLATES and "prefix" in template_fields(template)


def check_prompts(prepared: PreparedDataset, config: Config) -> int:
    """Try a config's prompts on every row, if the rows were prepared with others. Data of format 3 do not know.

    Returns:
        How many rows have an input that the prompt does not show.

    Raises:
        UserError: rows that cannot be asked with them.
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
    again = "; or leave them out: ftlib prepare CONFIG --again" if config.data.on_bad == "skip" else ""
    raise_all(faults, f"Set another data.prompt, or mend these records{again}.")
    return unshown


_UNFINISHED_SECONDS = 24 * 3600
"""After that an unfinished file is a killed writer's."""


def lengths_folder(site: Site) -> Path:
    """The folder of the cached lengths of rows, see `models/lengths.py`."""
    return site.store / "lengths"


def rows_hash(prepared: Path, split: str) -> str:
    """The beginning of the names of the lengths of a split's rows."""
    marker = files.read_json(prepared / files.COMPLETE_MARKER)
    rows = {name: entry["sha256"] for name, entry in marker.items() if name.startswith((f"{split}/", f"{split}."))}
    return files.json_sha256(rows)[:16]


def unused_lengths(site: Site, now: float) -> Iterator[Path]:
    """Files of prepared data that are gone, of older versions of ftlib, and of writers that were killed.

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
