"""First pass over a dataset: every row checked and put on disk, and of each the few numbers that a split depends on.

Memory: 84 bytes a row, whatever its text.
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
    """What the first pass leaves.

    Attributes:
        path: the rows, as `SplitRows` reads them.
        images: hash of each row's image, 0 without one, shape (n,).
        texts: of rows without one hash of their normalized prompt and answer, else 0, shape (n,).
        lines: of rows without one SHA-256 of their line of JSON, raw, shape (n,).
        own_ids: whether a row's id is its record's, shape (n,); the others have 64 bits of the SHA-256 of their fields.
        part_names: what the source calls its parts; the first is "", for rows without one.
        named: which of these each row has, shape (n,).
        sizes: number of rows of each part of a mixture (one after the other); "" → all, if it is none.
        labels: every answer that occurs, counted; None if there are more than `MAX_LABELS`.
        facts: names of all other fields that the records have.
        invalid: the faulty records, of which the first are kept, and their number.
        unlearned: how many answers of conversations are marked as not to be learned, and give no row.
        stripped: of how many rows space around an answer was taken off.
        unasked: how many of the faulty records are rows that the prompt cannot ask.
        unshown: how many rows have an input that the prompt does not show.
        unused: fields of what the rows were made from that nothing uses.
        remarks: what may be a mistake in the source, in words.
    """

    path: Path
    keys: SplitKeys
    images: Hashes
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
        """All rows, in the order of the source."""
        return SplitRows(self.path)

    def assign_splits(self, rule: SplitRule, groups: Hashes, contents: Hashes, dropped: Codes) -> Codes:
        """Which split each row belongs to, see `splits.assign_splits`; each part of a mixture is divided by itself.

        What then shows the content of another split is left out.

        Args:
            groups: what stays together, one entry for each row.
            contents: hash of each row's picture or text.
            dropped: negative for rows that are in no split, whatever the rule.

        Raises:
            UserError: as `splits.assign_splits`; or everything is asked, and nothing is left to train on.
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
        drop_leaked_contents(codes, contents)
        for code in (0, 1):
            if not (codes == code).any():
                problem = f"everything in {SPLITS[code]} is asked in another split, too, so that nothing is left"
                raise UserError(problem, "Give the rows of an image the same part, or set data.split.official: false.")
        return codes

    def duplicate_numbers(self) -> dict[int, int]:
        """Place of a row without an id of its own → 2, 3, …: how many rows with this content there are up to it."""
        indices = np.flatnonzero(~self.own_ids)
        order = indices[np.argsort(self.keys.rows[indices], kind="stable")]
        names = self.keys.rows[order]
        first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(order) else order
        counts = np.diff(np.r_[first, len(order)])
        ranks = np.arange(len(order)) - np.repeat(first, counts)
        return {int(index): int(rank) + 1 for index, rank in zip(order[ranks > 0], ranks[ranks > 0], strict=True)}


@dataclass
class InvalidRecords:
    """Records that cannot be used; all are counted, the first are kept in words.

    Attributes:
        with_id: how many are rows with an id of their own, which no later row may have.
    """

    stop: bool
    count: int = 0
    shown: list[str] = field(default_factory=list)
    with_id: int = 0

    def add(self, bad: InvalidRecord, row: Example | InvalidRecord | None = None) -> None:
        """Take note of one, which may have been a row."""
        self.count += 1
        self.with_id += isinstance(row, Example) and bool(row.id)
        if len(self.shown) < MAX_ERRORS_SHOWN:
            self.shown.append(f"{bad.location}: {bad.reason}")

    def raise_or_report(self) -> None:
        """Raise UserError if they are to stop the work; otherwise say how many are left out."""
        if not self.count:
            return
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        text = "\n".join([*self.shown, *more])
        if self.stop:
            raise UserError(text, "Mend these records, or leave them out with data.on_bad=skip. Nothing was written.")
        log.warning(f"{text}\n{self.count} records cannot be used and are left out")


class TaskRules(Protocol):
    """What is asked of a task (`tasks.base.Task`) while a dataset is prepared for it."""

    @property
    def name(self) -> str: ...

    @property
    def closed_labels(self) -> bool: ...

    @property
    def validate_image_size(self) -> Callable[[Example, tuple[int, int]], str] | None: ...

    def validated(self, row: Example | InvalidRecord) -> Example | InvalidRecord: ...


def scan_source(data: Data, path: Path, task: TaskRules, transform: RowTransform | None = None) -> ScannedDataset:
    """Read a source once; files of one record in a line by all cores.

    Args:
        path: where the rows are put.
        task: says which rows its metric could not judge; they are faulty, too.
        transform: writes answers in the words that are learned, where the source has another form of them.

    Raises:
        UserError: faulty records (unless they are to be skipped), no rows at all, a prompt that names what rows lack.
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
        raise UserError(f"{empty[0]}: no rows in it", "Check source, root and file.")
    if task.closed_labels and scanned.labels is None:
        problem = f"{data.root}: more than {MAX_LABELS:,} different answers are no closed set of labels"
        raise UserError(problem, "Set another task, or check which column data.columns takes as suffix.")
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
    rows, groups, strata, images, texts = (array("Q") for _ in range(5))
    parts, named, lines, own_ids = array("b"), array("H"), bytearray(), bytearray()
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
        else:  # the same id wherever the row stands among the others
            own_ids.append(False)
            row.id = f"{row.dataset}/{line.hexdigest()[:16]}" if row.dataset else line.hexdigest()[:16]
            name = int.from_bytes(line.digest()[:8], "big")
        rows.append(name)
        if row.image:
            images.append(image := hash_text(row.image))
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
    """Go through the pieces of a source, as `_scan`, with one process for each core.

    None where it has to be read from its beginning, or where the pieces do not fit together: whoever reads one after
    the other can say of what is wrong where it stands.

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
    # Forked, a process needs no imports, and none that the working folder could replace.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_end_with_parent)
    try:
        running = deque(pool.submit(_scan_chunk, data, path, task, chunk) for chunk in islice(waiting, 2 * processes))
        with RowWriter(path) as writer, log.progress("reading rows", 0) as update:
            for chunk in all_pieces:
                read = running.popleft().result()
                if read is None:
                    return None
                running.extend(pool.submit(_scan_chunk, data, path, task, chunk) for chunk in islice(waiting, 1))
                writer.write_stream(read.rows)
                names[chunk.part].merge(read.names)
                scans.append(read.scanned)
                update(len(writer), "")
    except BrokenProcessPool:
        remedy = "Was it killed for want of memory? Try again with more, or with fewer cores (taskset -c 0)."
        raise UserError(f"{data.root}: a process that read its rows was ended", remedy) from None
    finally:
        pool.shutdown(cancel_futures=True)
    scanned = _concatenate(scans)
    own = scanned.keys.rows[scanned.own_ids]
    if len(np.unique(own)) < len(own) or scanned.invalid.with_id:
        return None
    for each in names.values():
        each.finish()
    return scanned


class _ChunkScan(NamedTuple):
    """What a process returns of a piece: its rows as an Arrow stream."""

    scanned: ScannedDataset
    names: SplitNames
    rows: bytes


def _scan_chunk(data: Data, path: Path, task: TaskRules, chunk: SourceChunk) -> _ChunkScan | None:
    import pyarrow

    names, sink = SplitNames(data.datasets[chunk.part]), pyarrow.BufferOutputStream()
    try:
        with RowWriter(sink) as writer:
            scanned = _scan(iter_examples(data, task.name, chunk, names), data, path, task, writer)
    except UserError:  # perhaps another one for who knows all rows
        return None
    return _ChunkScan(scanned, names, sink.getvalue().to_pybytes())


def _end_with_parent() -> None:
    """A reading process ends with the command, however that ends; signals, sent to all processes, are the command's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _concatenate(scans: Sequence[ScannedDataset]) -> ScannedDataset:
    """One scan of several, in their order."""
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

    columns = ([getattr(scanned.keys, column.name) for scanned in scans] for column in fields(SplitKeys))
    return ScannedDataset(
        scans[0].path,
        SplitKeys(*map(np.concatenate, columns)),
        joined("images"),
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
    """Hash of what is asked and answered, whatever the case, the blanks and the form of its characters."""
    context = row.facts.get("messages") or row.facts.get("input") or ""
    text = f"{row.prefix}\0{row.suffix}\0{context}"
    if not text.isascii():
        text = normalize("NFKC", text)
    return hash_text(" ".join(text.casefold().split())) or 1


def first_rows_of_images(scanned: ScannedDataset) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Every image's hash, ascending, and a row that shows it."""
    names, first = np.unique(scanned.images, return_index=True)
    shown = names != _NONE
    return names[shown], first[shown]


def sample(rows: SplitRows, count: int) -> list[Example]:
    """At most `count` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return list(islice((rows[index] for index in range(0, len(rows), step)), count))
