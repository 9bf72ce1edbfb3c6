"""First pass over a dataset: validate every row, write it to disk, and collect the hashes that splits depend on.

Memory: 84 bytes per row, independent of its text.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlib.config.schema import Data, SplitRule
from ftlib.core import log
from ftlib.core.text import normalize
from ftlib.data.dataset import RowWriter, SplitRows
from ftlib.data.example import MAX_ERRORS_SHOWN, Example, InvalidRecord, to_json_line
from ftlib.data.prompts import hides_context, prompt_checker
from ftlib.data.sources.annotations import warn_other_files
from ftlib.data.sources.registry import SourceChunk, iter_examples, source_chunks
from ftlib.data.split_names import SplitNames
from ftlib.data.splits import (
    NO_OFFICIAL_SPLIT,
    SPLITS,
    Codes,
    Hashes,
    SplitKeys,
    assign_splits,
    drop_leaked_contents,
    hash_text,
)
from ftlib.errors import UserError

MAX_LABELS = 10_000
_NONE = 0
_NO_LINE = bytes(32)
_EVERY = 1000
_CODES = {"": NO_OFFICIAL_SPLIT} | {split: code for code, split in enumerate(SPLITS)}
_dumps = json.JSONEncoder(ensure_ascii=False).encode

RowTransform = Callable[[Example | InvalidRecord], Example | InvalidRecord]


@dataclass
class ScannedDataset:
    """Result of the first pass.

    Attributes:
        path: the rows, for `SplitRows`.
        images: hash of each row's first image, 0 without an image, shape (n,).
        other_images, other_rows: hashes of the other images, and the row of each, shape (m,).
        texts: for rows without an image, hash of the normalized prompt and answer, else 0, shape (n,).
        lines: for rows without an image, SHA-256 of their JSON line, raw, shape (n,).
        own_ids: whether the record has an ID, shape (n,); other rows get 64 bits of the SHA-256 of their fields.
        part_names: the source's names of its official splits; the first is "", for rows without one.
        named: index into `part_names` of each row, shape (n,).
        sizes: number of rows of each dataset of a mixture, in order; "" → all rows, without a mixture.
        labels: all answers with counts; None if there are more than `MAX_LABELS`.
        facts: names of all other fields of the records.
        invalid: the number of invalid records, and the first ones.
        unlearned: number of answers in conversations that are marked as not trained on and give no row.
        stripped: number of rows whose answer had surrounding whitespace removed.
        unasked: number of invalid records rejected only because the prompt does not fit.
        unshown: number of rows with an input that the prompt does not show.
        unused: unused fields of the records.
        remarks: possible mistakes in the source.
    """

    path: Path
    keys: SplitKeys
    images: Hashes
    other_images: Hashes
    other_rows: NDArray[np.int64]
    texts: Hashes
    lines: NDArray[np.void]
    own_ids: NDArray[np.bool_]
    part_names: list[str]
    named: NDArray[np.uint16]
    sizes: dict[str, int]
    labels: Counter[str] | None
    facts: list[str]
    invalid: InvalidRecords
    unlearned: int
    stripped: int
    unasked: int
    unshown: int
    unused: list[str]
    remarks: list[str]

    @property
    def rows(self) -> SplitRows:
        """Return all rows, in the order of the source."""
        return SplitRows(self.path)

    @property
    def all_images(self) -> Hashes:
        """Return the hashes of all images: the first of every row, then the others."""
        return np.concatenate([self.images, self.other_images])

    @property
    def rows_of_images(self) -> NDArray[np.int64]:
        """Return the row of each of `all_images`."""
        return np.concatenate([np.arange(len(self.images)), self.other_rows])

    def assign_splits(self, rule: SplitRule, groups: Hashes, contents: Hashes, dropped: Codes) -> Codes:
        """Return the split of each row, see `splits.assign_splits`; each dataset of a mixture is split separately.

        Rows whose content also occurs in another split are then left out.

        Args:
            groups: group of each row, which stays in one split.
            contents: hash of each row's first image or its text, then of the other images, as `all_images`.
            dropped: negative for rows that are never in a split.

        Raises:
            UserError: as `splits.assign_splits`; or a split would be empty.
        """
        keys, codes, start = replace(self.keys, groups=groups), dropped.copy(), 0
        for name, size in self.sizes.items():
            indices = start + np.flatnonzero(dropped[start : start + size] >= 0)
            start += size
            try:
                if not len(indices):
                    raise UserError(f"none of {size} rows can be used", "See the records above.")
                codes[indices] = assign_splits(keys.select(indices), rule, alone=not name)
            except UserError as error:
                raise UserError(f"part {name}: {error.problem}" if name else error.problem, error.remedy) from None
        drop_leaked_contents(codes, contents, self.rows_of_images)
        for code in (0, 1):
            if not (codes == code).any():
                problem = (
                    f"every image of {SPLITS[code]} also occurs in another split, so {SPLITS[code]} would be empty"
                )
                remedy = "Put all rows of an image in one split, or set data.split.official: false."
                raise UserError(problem, remedy)
        return codes

    def duplicate_numbers(self) -> dict[int, int]:
        """Return index → 2, 3, … of rows without an ID whose content occurs before: the count so far, to number
        them."""
        indices = np.flatnonzero(~self.own_ids)
        order = indices[np.argsort(self.keys.rows[indices], kind="stable")]
        names = self.keys.rows[order]
        first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(order) else order
        counts = np.diff(np.r_[first, len(order)])
        ranks = np.arange(len(order)) - np.repeat(first, counts)
        return {int(index): int(rank) + 1 for index, rank in zip(order[ranks > 0], ranks[ranks > 0], strict=True)}


@dataclass
class InvalidRecords:
    """Invalid records: all are counted, messages of the first are kept.

    Attributes:
        with_id: number of those with an ID, which no later row may have.
    """

    stop: bool
    count: int = 0
    shown: list[str] = field(default_factory=list)
    with_id: int = 0

    def add(self, bad: InvalidRecord, row: Example | InvalidRecord | None = None) -> None:
        """Add an invalid record; `row` is the row that was made of it, if any."""
        self.count += 1
        self.with_id += isinstance(row, Example) and bool(row.id)
        if len(self.shown) < MAX_ERRORS_SHOWN:
            self.shown.append(f"{bad.location}: {bad.reason}")

    def raise_or_report(self) -> None:
        """Raise UserError with `on_bad: stop`; otherwise report the number of skipped records."""
        if not self.count:
            return
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        text = "\n".join([*self.shown, *more])
        if self.stop:
            raise UserError(text, "Fix these records, or skip them with data.on_bad=skip. Nothing was written.")
        log.warning(f"{text}\n{self.count} invalid records are skipped")


class TaskRules(Protocol):
    """The part of a task (`tasks.base.Task`) that preparing a dataset needs."""

    @property
    def name(self) -> str: ...

    @property
    def closed_labels(self) -> bool: ...

    @property
    def validate_image_size(self) -> Callable[[Example, tuple[int, int]], str] | None: ...

    def validated(self, row: Example | InvalidRecord) -> Example | InvalidRecord: ...


def scan_source(data: Data, path: Path, task: TaskRules, transform: RowTransform | None = None) -> ScannedDataset:
    """Read a source once; line-based files are read on all cores.

    Args:
        path: file for the rows.
        task: validates rows; rows that its metric cannot score are invalid.
        transform: converts answers to the target text, if the source has another format.

    Raises:
        UserError: invalid records (unless they are skipped), no rows, a prompt with fields that the rows lack.
    """
    for part in data.datasets.values():
        warn_other_files(part)
    scanned = None if transform else _scan_in_parallel(data, path, task)
    if scanned is None:
        found = iter_examples(data, task.name)
        with RowWriter(path) as writer, log.progress("reading rows", 0) as update:
            scanned = _scan(map(transform, found) if transform else found, data, path, task, writer, update)
    scanned.invalid.raise_or_report()
    if empty := [data.datasets[name].root for name, size in scanned.sizes.items() if not size]:
        raise UserError(f"{empty[0]}: has no rows", "Check source, root and file.")
    if task.closed_labels and scanned.labels is None:
        problem = f"{data.root}: more than {MAX_LABELS:,} different answers, too many for a set of labels"
        raise UserError(problem, "Set another task, or check the column of suffix in data.columns.")
    return scanned


def _scan(
    found: Iterator[Example | InvalidRecord],
    data: Data,
    path: Path,
    task: TaskRules,
    writer: RowWriter,
    update: log.ProgressUpdate | None = None,
) -> ScannedDataset:
    bad = InvalidRecords(stop=data.on_bad == "stop")
    rows, groups, strata, images, texts, other_images = (array("Q") for _ in range(6))
    parts, other_rows, named, lines, own_ids = array("b"), array("q"), array("H"), bytearray(), bytearray()
    part_names = {"": 0}
    labels: Counter[str] | None = Counter()
    facts: set[str] = set()
    unused: set[str] = set()
    remarks: set[str] = set()
    sizes = dict.fromkeys(data.datasets, 0)
    stratified = data.split.stratify_by is not None
    unlearned = stripped = unasked = unshown = 0
    templates = data.templates
    faults = {name: prompt_checker(template) for name, template in templates.items()}
    checked = task.validated
    for each in found:
        row = checked(each)
        if isinstance(row, InvalidRecord):
            bad.add(row, each)
            continue
        if reason := faults[row.dataset](row):
            unasked += 1
            bad.add(InvalidRecord(row.location, reason), row)
            continue
        sizes[row.dataset] += 1
        unlearned += row.unlabelled_turns
        stripped += row.stripped
        unshown += hides_context(templates[row.dataset], row)
        others = _dumps(row.facts) if row.facts else None
        facts.update(row.facts)
        unused |= row.unused
        remarks |= row.remarks
        line = hashlib.sha256(to_json_line(row, others).encode())
        if row.id:
            own_ids.append(True)
            name = hash_text(row.id)
        else:  # the ID does not depend on the row's position
            own_ids.append(False)
            row.id = f"{row.dataset}/{line.hexdigest()[:16]}" if row.dataset else line.hexdigest()[:16]
            name = int.from_bytes(line.digest()[:8], "big")
        rows.append(name)
        if row.image:
            images.append(image := hash_text(row.image))
            other_images.extend(map(hash_text, row.other_images))
            other_rows.extend([len(rows) - 1] * len(row.other_images))
            groups.append(hash_text(row.group) if row.group else image)
            texts.append(_NONE)
            lines.extend(_NO_LINE)
        else:
            images.append(_NONE)
            groups.append(hash_text(row.group) if row.group else name)
            texts.append(_text_hash(row))
            lines.extend(line.digest())
        strata.append(hash_text(row.suffix) if stratified else 0)
        parts.append(_CODES[row.part])
        named.append(part_names.setdefault(row.part_name, len(part_names)) if row.part_name else 0)
        if labels is not None:
            labels[row.suffix] += 1
            if len(labels) > MAX_LABELS:
                labels = None
        writer.write(row, others)
        if update and len(writer) % _EVERY == 0:
            update(len(writer), "")
    keys = SplitKeys(
        rows=np.frombuffer(rows, dtype=np.uint64),
        groups=np.frombuffer(groups, dtype=np.uint64),
        strata=np.frombuffer(strata, dtype=np.uint64),
        official_splits=np.frombuffer(parts, dtype=np.int8),
    )
    return ScannedDataset(
        path,
        keys,
        np.frombuffer(images, dtype=np.uint64),
        np.frombuffer(other_images, dtype=np.uint64),
        np.frombuffer(other_rows, dtype=np.int64),
        np.frombuffer(texts, dtype=np.uint64),
        np.frombuffer(lines, dtype="V32"),
        np.frombuffer(own_ids, dtype=np.bool_),
        list(part_names),
        np.frombuffer(named, dtype=np.uint16),
        sizes,
        labels,
        sorted(facts),
        bad,
        unlearned,
        stripped,
        unasked,
        unshown,
        sorted(unused),
        sorted(remarks),
    )


def _scan_in_parallel(data: Data, path: Path, task: TaskRules) -> ScannedDataset | None:
    """Scan the chunks of a source with one process per core, as `_scan`.

    Returns None if the source cannot be divided, or if something is wrong: a sequential scan then reports the location
    of the error.

    Raises:
        UserError: a process was killed.
    """
    processes = len(os.sched_getaffinity(0))
    all_pieces = source_chunks(data) if processes > 1 else []
    if len(all_pieces) < 2:
        return None
    scans: list[ScannedDataset] = []
    names = {name: SplitNames(part) for name, part in data.datasets.items()}
    waiting = iter(all_pieces)
    # A forked process needs no imports, so the working directory cannot inject modules, and inherits a plugin's task,
    # which could not be pickled.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=(data, path, task))
    try:
        running = deque(pool.submit(_scan_chunk, chunk) for chunk in islice(waiting, 2 * processes))
        with RowWriter(path) as writer, log.progress("reading rows", 0) as update:
            for chunk in all_pieces:
                read = running.popleft().result()
                if read is None:
                    return None
                running.extend(pool.submit(_scan_chunk, chunk) for chunk in islice(waiting, 1))
                writer.write_stream(read.rows)
                names[chunk.part].merge(read.names)
                scans.append(read.scanned)
                update(len(writer), "")
    except BrokenProcessPool:
        remedy = "It may have run out of memory. Try again with more memory, or with fewer cores (taskset -c 0)."
        raise UserError(f"{data.root}: a process that read rows was killed", remedy) from None
    finally:
        pool.shutdown()  # with cancel_futures Python 3.11 waits for ever if an item could not be sent to a process
    scanned = _concatenate(scans)
    own = scanned.keys.rows[scanned.own_ids]
    if len(np.unique(own)) < len(own) or scanned.invalid.with_id:
        return None
    for each in names.values():
        each.finish()
    return scanned


class _ChunkScan(NamedTuple):
    """A process's result for a chunk: its rows as an Arrow stream."""

    scanned: ScannedDataset
    names: SplitNames
    rows: bytes


_inherited: tuple[Data, Path, TaskRules]
"""Of a process that scans chunks."""


def _scan_chunk(chunk: SourceChunk) -> _ChunkScan | None:
    import pyarrow

    data, path, task = _inherited
    names, sink = SplitNames(data.datasets[chunk.part]), pyarrow.BufferOutputStream()
    try:
        with RowWriter(sink) as writer:
            scanned = _scan(iter_examples(data, task.name, chunk, names), data, path, task, writer)
    except UserError:  # the sequential scan will report the error
        return None
    return _ChunkScan(scanned, names, sink.getvalue().to_pybytes())


def _start_process(data: Data, path: Path, task: TaskRules) -> None:
    """Exit when the parent process ends, and leave signals to the parent."""
    global _inherited
    _inherited = data, path, task
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _concatenate(scans: Sequence[ScannedDataset]) -> ScannedDataset:
    """Concatenate scans in order."""
    part_names = {"": 0}
    labels: Counter[str] | None = Counter()
    sizes, bad, named = dict.fromkeys(scans[0].sizes, 0), InvalidRecords(scans[0].invalid.stop), []
    for scanned in scans:
        codes = [part_names.setdefault(name, len(part_names)) for name in scanned.part_names]
        named.append(np.array(codes, dtype=np.uint16)[scanned.named])
        for name, size in scanned.sizes.items():
            sizes[name] += size
        bad.count += scanned.invalid.count
        bad.with_id += scanned.invalid.with_id
        bad.shown = [*bad.shown, *scanned.invalid.shown][:MAX_ERRORS_SHOWN]
        if labels is not None:
            labels = None if scanned.labels is None else labels + scanned.labels
            if labels is not None and len(labels) > MAX_LABELS:
                labels = None

    def names(name: str) -> list[str]:
        return sorted({each for scanned in scans for each in getattr(scanned, name)})

    def joined(name: str) -> Any:
        return np.concatenate([getattr(scanned, name) for scanned in scans])

    def added(name: str) -> int:
        return sum(getattr(scanned, name) for scanned in scans)

    starts = np.cumsum([0, *(len(scanned.images) for scanned in scans)])
    columns = ([getattr(scanned.keys, column.name) for scanned in scans] for column in fields(SplitKeys))
    return ScannedDataset(
        scans[0].path,
        SplitKeys(*map(np.concatenate, columns)),
        joined("images"),
        joined("other_images"),
        np.concatenate([start + scanned.other_rows for start, scanned in zip(starts, scans, strict=False)]),
        joined("texts"),
        joined("lines"),
        joined("own_ids"),
        list(part_names),
        np.concatenate(named),
        sizes,
        labels,
        names("facts"),
        bad,
        added("unlearned"),
        added("stripped"),
        added("unasked"),
        added("unshown"),
        names("unused"),
        names("remarks"),
    )


def _text_hash(row: Example) -> int:
    """Return a hash of question and answer that ignores case, whitespace and Unicode form."""
    context = row.facts.get("messages") or row.facts.get("input") or ""
    text = f"{row.prefix}\0{row.suffix}\0{context}"
    if not text.isascii():
        text = normalize("NFKC", text)
    return hash_text(" ".join(text.casefold().split())) or 1


def first_rows_of_images(
    scanned: ScannedDataset,
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the hashes of all images, ascending, the index of a row of each, and its number among the row's images."""
    names, first = np.unique(scanned.all_images, return_index=True)
    first = first[names != _NONE]
    rows, count = scanned.rows_of_images[first], len(scanned.images)
    starts = np.searchsorted(scanned.other_rows, rows)  # of the row's images among the others, which are in order
    return names[names != _NONE], rows, np.where(first < count, 0, first - count - starts + 1)


def sample(rows: SplitRows, count: int) -> list[Example]:
    """Return at most `count` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return list(islice((rows[index] for index in range(0, len(rows), step)), count))
