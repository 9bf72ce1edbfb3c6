"""Prepare a dataset: check every row and image, split into train, valid and test, write to the store."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ftlib.config.schema import Config, Data, SplitRule
from ftlib.core import files, log
from ftlib.core.paths import Site, stored_path
from ftlib.data.dataset import (
    FORMAT,
    PreparedDataset,
    RowWriter,
    SplitRows,
    file_stat,
    following_folder,
    image_sample,
    prepared_folder,
    read_batches,
    read_prepared,
    source_contents,
)
from ftlib.data.example import MAX_ERRORS_SHOWN, Example, InvalidRecord, to_json_line
from ftlib.data.images import ImageInfo, choose_frames, image_path, inspect_image
from ftlib.data.labels import labels_missing_in_train, suspicious_labels
from ftlib.data.near_duplicates import near_duplicates
from ftlib.data.scan import RowTransform, ScannedDataset, TaskRules, first_rows_of_images, scan_source
from ftlib.data.sources.image_references import row_image_path
from ftlib.data.sources.registry import skipped_counts
from ftlib.data.splits import ANIMATED, LEAKED, LEFT_OUT, SPLITS, UNREADABLE, Codes, Hashes, hash_text, merge_groups
from ftlib.errors import UserError

_BLOCK = 1000
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_SHARD = 10**9
"""Approximate size of a file of rows in bytes."""

_SPOOL = "rows.arrow"
_EXCLUSION_REASONS = {
    LEFT_OUT: "beyond max_train or max_eval",
    LEAKED: "asked in another split",
    UNREADABLE: "unreadable image",
    ANIMATED: "animated image",
}
NEAR_SHOWN = 8
"""Number of near-duplicate pairs that are shown."""

_MAX_MISSED = 1000
"""Number of unusable images that are recorded, to see later whether they were repaired."""


def prepare(
    config: Config, site: Site, task: TaskRules, transform: RowTransform | None = None, again: bool = False
) -> PreparedDataset:
    """Check, split and write a dataset: two passes over its rows; each image is opened once.

    Args:
        task: the config's task.
        transform: see `scan.scan_source`.
        again: prepare again even if prepared data exist; existing runs keep the old data.

    Raises:
        UserError: invalid rows or images, impossible splits, storage full or read-only.
    """
    target = prepared_folder(config, site)
    again = again and files.is_complete(target)
    if again:
        target = following_folder(target)
    with files.atomic_directory(target) as folder:
        scanned = scan_source(config.data, folder / _SPOOL, task, transform)
        images = check_images(scanned, config.data, task)
        contents = find_content_groups(scanned, images, config.data.split)
        codes = scanned.assign_splits(
            config.data.split, contents.groups, contents.names, exclusion_codes(scanned, images, config.data)
        )
        splits = _write(folder, scanned, images, codes, config.data)
        missed = {name: file_stat(image_path(Path(config.data.root), name)) for name in images.invalid[:_MAX_MISSED]}
        files.write_json(
            folder / "bad.json", {"count": scanned.invalid.count, "shown": scanned.invalid.shown, "images": missed}
        )
        dropped = {why: count for code, why in _EXCLUSION_REASONS.items() if (count := int((codes == code).sum()))}
        facts = {
            "format": FORMAT,
            "again": again,
            "root": stored_path(Path(config.data.root), site.store),
            "content": files.json_sha256(source_contents(config)),
            "source": config.data.source,
            "rule": config.data.split.model_dump(),
            "prompts": config.data.templates,
            "unasked": scanned.unasked,
            "unshown": scanned.unshown,
            "labels": sorted(scanned.labels) if scanned.labels is not None else None,
            "splits": splits,
            "bad": scanned.invalid.count,
            "left_out": {**skipped_counts(config.data), **dropped} | _unlearned(scanned),
            "parts": _parts(scanned, codes),
            "fields": scanned.facts,
            "unused": scanned.unused,
            "remarks": scanned.remarks,
            "stripped": scanned.stripped,
            "together": contents.counted,
            "sample": [pair for split in SPLITS for pair in image_sample(SplitRows(folder / split))],
        }
        if task.closed_labels:
            labels = {split: _labels(SplitRows(folder / split)) for split in SPLITS}
            told = suspicious_labels(scanned.labels or {}) + labels_missing_in_train(labels)
            if told := told + _contradictions([SplitRows(folder / split) for split in SPLITS]):
                facts["suspicious_labels"] = told
        if alike := sorted(images.one_color):
            facts["one_color"] = {"images": len(alike), "shown": alike[:MAX_ERRORS_SHOWN]}
        files.write_json(folder / "data.json", facts, urls=False)  # labels must be those of the rows
        for spool in folder.glob("*.arrow"):
            spool.unlink()
    return read_prepared(target, config)


def _labels(rows: SplitRows) -> set[str]:
    return {label for batch in rows.batches for label in batch.column("suffix").unique().to_pylist()}


def _contradictions(splits: Sequence[SplitRows]) -> list[str]:
    """Return a message about images with several labels for the same question; empty if there are none.

    Memory: 16 bytes per row with an image.
    """
    columns = ("id", "digest", "prefix", "suffix")

    def rows_with_images() -> Iterator[tuple[int, str, str]]:
        """Yield hash of image and question, ID and label of each row."""
        for batch in itertools.chain.from_iterable(rows.batches for rows in splits):
            for name, digest, prefix, suffix in zip(*(batch.column(c).to_pylist() for c in columns), strict=True):
                if digest:
                    yield hash_text(f"{digest}\0{prefix}"), name, suffix

    hashes = array("Q")
    for asked, _, label in rows_with_images():
        hashes.extend((asked, hash_text(label)))
    pairs = np.unique(np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2), axis=0)[:, 0]
    several = set(pairs[1:][pairs[1:] == pairs[:-1]].tolist())
    if not several:
        return []
    first: dict[int, str] = {}
    told: dict[int, str] = {}
    for asked, name, label in rows_with_images():
        if asked in several and len(told) < 3 and first.setdefault(asked, label) != label:
            told.setdefault(asked, f"{name} is {label!r:.60}, and {first[asked]!r:.60} in another row")
    shown = "; ".join(told.values())
    return [f"{len(several):,} {'images have' if len(several) > 1 else 'image has'} several labels: {shown}"]


def _parts(scanned: ScannedDataset, codes: Codes) -> list[dict[str, Any]]:
    """Return the source's names of its official splits, with the number of rows of each in train, valid and test."""
    found = []
    for number, name in enumerate(scanned.part_names):
        here = codes[scanned.named == number]
        counts = {split: int((here == code).sum()) for code, split in enumerate(SPLITS)}
        if any(counts.values()):
            found.append({"name": name} | counts)
    return found


@dataclass(frozen=True)
class ImageTable:
    """Properties of all images of a dataset, 44 bytes each.

    Attributes:
        names: hashes of their names, ascending, shape (n,).
        digests: SHA-256 of their bytes, raw.
        frames: number of frames; 0 if the image cannot be used.
        sizes, kinds: number of images by size, and by format and mode.
        one_color: names of images whose pixels are all equal.
        perceptual_hashes: see `near_duplicates`, shape (n, 2); 0 if unknown.
        invalid: names of images that cannot be used.
        first_rows, positions: index of the first row of each image, and the image's number among those of the row.
    """

    names: NDArray[np.uint64]
    digests: NDArray[np.void]
    frames: NDArray[np.int32]
    sizes: Counter[tuple[int, int]]
    kinds: Counter[str]
    one_color: list[str]
    perceptual_hashes: NDArray[np.uint64]
    invalid: list[str]
    first_rows: NDArray[np.int64]
    positions: NDArray[np.int64]

    def name(self, scanned: ScannedDataset, number: int) -> str:
        """Return the path of an image."""
        return scanned.rows[int(self.first_rows[number])].images[int(self.positions[number])]

    def find(self, name: int) -> tuple[str, int]:
        """Return the digest in hexadecimal and the number of frames."""
        index = int(np.searchsorted(self.names, np.uint64(name)))
        return bytes(self.digests[index]).hex(), int(self.frames[index])

    def of_rows(self, values: NDArray[Any], scanned: ScannedDataset, without: Any) -> NDArray[Any]:
        """Return the value of each of `scanned.all_images`.

        Args:
            values: one for each image.
            without: the value for rows without an image.
        """
        images = scanned.all_images
        found = np.full(len(images), without, dtype=values.dtype)
        shown = images != 0
        found[shown] = values[np.searchsorted(self.names, images[shown])]
        return found


def check_images(scanned: ScannedDataset, data: Data, task: TaskRules) -> ImageTable:
    """Decode every image once; unreadable ones, and those that contradict their rows, count as invalid records.

    Raises:
        UserError: invalid images, unless they are skipped.
    """
    names, indices, positions = first_rows_of_images(scanned)
    rows, root, misfit = scanned.rows, Path(data.root), task.validate_image_size
    digests, frames = np.zeros(len(names), dtype="V32"), np.zeros(len(names), dtype=np.int32)
    looks = np.zeros((len(names), 2), dtype=np.uint64)
    found = ImageTable(names, digests, frames, Counter(), Counter(), [], looks, [], indices, positions)

    by_image = np.argsort(scanned.images, kind="stable") if misfit else indices

    def inspect(number: int) -> ImageInfo | InvalidRecord:
        index = int(indices[number])
        row, name = rows[index], found.name(scanned, number)
        path = root / name
        try:
            path = row_image_path(root, name)
            seen = inspect_image(path, data.max_pixels)
            if misfit:
                ends = (np.searchsorted(scanned.images, scanned.images[index], side, by_image) for side in _SIDES)
                for row in map(rows.__getitem__, by_image[slice(*ends)].tolist()):
                    if problem := misfit(row, seen.size):
                        raise UserError(problem)
            return seen
        except UserError as error:
            found.invalid.append(name)
            return InvalidRecord(f"row {row.id}", error.problem.replace(str(path), str(root / name)))

    bad_rows = scanned.invalid.count
    with ThreadPoolExecutor() as pool, log.progress("checking images", len(names)) as update:
        for start in range(0, len(names), _BLOCK):
            for number, seen in enumerate(pool.map(inspect, range(start, min(start + _BLOCK, len(names)))), start):
                if isinstance(seen, InvalidRecord):
                    scanned.invalid.add(seen)
                else:
                    _store_image_info(found, number, seen)
                    if seen.one_color:
                        found.one_color.append(found.name(scanned, number))
                update(number + 1, "")
    if scanned.invalid.count > bad_rows:
        scanned.invalid.raise_or_report()
    return found


def _unlearned(scanned: ScannedDataset) -> dict[str, int]:
    return {"answers that are not to be learned": scanned.unlearned} if scanned.unlearned else {}


def _store_image_info(images: ImageTable, number: int, seen: ImageInfo) -> None:
    images.digests[number] = np.void(bytes.fromhex(seen.digest))
    images.frames[number] = seen.frames
    images.perceptual_hashes[number] = seen.perceptual_hash
    images.sizes[seen.size] += 1
    images.kinds[seen.kind] += 1


@dataclass(frozen=True)
class ContentGroups:
    """Groups of rows with the same content.

    Attributes:
        names: hash of each row's first image or its text, then of the other images, as `ScannedDataset.all_images`.
        groups: group of each row; a group stays in one split, shape (n,).
        counted: number of rows and groups that were merged because of equal content; near-duplicate images, with
            examples.
    """

    names: Hashes
    groups: Hashes
    counted: dict[str, Any]


def find_content_groups(scanned: ScannedDataset, images: ImageTable, rule: SplitRule) -> ContentGroups:
    """Group rows that share an image (under any name), and rows without an image with the same question and answer.

    Without duplicates, the groups are those of the source.
    """
    digests = images.digests.view("V8")[::4].copy().view(np.uint64) if len(images.names) else np.empty(0, np.uint64)
    count, all_images = len(scanned.images), scanned.all_images
    texts = np.concatenate([scanned.texts, np.zeros_like(scanned.other_images)])
    names = np.where(all_images == 0, texts, images.of_rows(digests, scanned, np.uint64(0)))
    names = np.where(names == 0, all_images, names)  # unreadable images are identified by name
    of_images = scanned.keys.groups[scanned.rows_of_images]
    groups = merge_groups(of_images, names)
    alike = near_duplicates(images.perceptual_hashes, images.digests)
    counted: dict[str, Any] = _merge_counts(scanned.keys.groups, groups[:count])
    if alike.pairs:
        shown = [[images.name(scanned, index) for index in pair] for pair in alike.pairs[:NEAR_SHOWN]]
        named = alike.groups[alike.groups > 0]
        counted["near"] = {"images": len(named), "groups": len(np.unique(named)), "shown": shown}
    if rule.near_duplicates == "group":
        groups = merge_groups(groups, images.of_rows(alike.groups, scanned, np.uint64(0)))
    return ContentGroups(names, groups[:count], counted)


def _merge_counts(before: Hashes, after: Hashes) -> dict[str, int]:
    """Return how many rows are in groups that were merged, and how many such groups there are."""
    pairs = np.unique(np.stack([after, before], axis=1), axis=0)
    names, counts = np.unique(pairs[:, 0], return_counts=True)
    joined = names[counts > 1]
    return {"rows": int(np.isin(after, joined).sum()), "groups": len(joined)}


def exclusion_codes(scanned: ScannedDataset, images: ImageTable, data: Data) -> Codes:
    """Return a negative code for rows without a split: an image is unreadable, or animated and excluded.

    Raises:
        UserError: an animated image among several in a row, of which only the first frame can be used.
    """
    frames, rows = images.of_rows(images.frames, scanned, np.int32(1)), scanned.rows_of_images
    animated = np.unique(rows[frames > 1])
    codes = np.zeros(len(scanned.images), dtype=np.int8)
    if data.frames == "exclude":
        codes[animated] = ANIMATED
    elif data.frames != "first" and len(mixed := np.intersect1d(animated, scanned.other_rows)):
        problem = f"row {scanned.rows[int(mixed[0])].id} has several images, and an animated one among them"
        raise UserError(problem, "Set data.frames: first, or exclude.")
    codes[rows[frames == 0]] = UNREADABLE
    return codes


class _SplitWriter:
    """Writes the rows of a split."""

    def __init__(self, spool: Path, several_images: bool) -> None:
        self.spool = spool
        self.writer = RowWriter(spool, several_images)
        self.datasets: Counter[str] = Counter()
        self.sum = 0

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint: a sum of hashes, independent of the order of rows."""
        return f"{self.sum % (1 << 256):064x}"[:16]

    def add(self, row: Example) -> None:
        facts = json.dumps(row.facts, ensure_ascii=False) if row.facts else None
        self.writer.write(row, facts)
        self.datasets[row.dataset] += 1
        self.add_line(hashlib.sha256(to_json_line(row, facts).encode()).digest())

    def add_line(self, digest: bytes) -> None:
        self.sum += int.from_bytes(digest, "big")


def _write(folder: Path, scanned: ScannedDataset, images: ImageTable, codes: Codes, data: Data) -> dict[str, Any]:
    """Second pass: write every row to its split.

    Returns:
        Split → number of rows (also for each dataset of a mixture) and fingerprint.
    """
    import datasets
    from datasets.table import MemoryMappedTable

    several = len(scanned.other_images) > 0
    splits = {split: _SplitWriter(folder / f"{split}.arrow", several) for split in SPLITS}
    with ExitStack() as stack, log.progress("writing splits", len(codes)) as update:
        for split in splits.values():
            stack.enter_context(split.writer)
        divide = _write_image_rows if len(images.names) else _write_text_rows
        for done in divide(scanned, images, codes, data, list(splits.values())):
            update(done, "")
    _return_free_memory()
    datasets.disable_progress_bars()
    tables = {
        name: datasets.Dataset(MemoryMappedTable.from_file(str(split.spool)), fingerprint=split.fingerprint)
        for name, split in splits.items()
    }
    # an empty split needs a file, too, to be opened
    shards = {name: max(1, -(-split.spool.stat().st_size // _SHARD)) for name, split in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(folder), num_shards=shards)
    found: dict[str, Any] = {}
    for name, split in splits.items():
        found[name] = {"rows": len(split.writer), "fingerprint": split.fingerprint}
        found[name] |= {"parts": {part: split.datasets[part] for part in data.datasets}} if data.parts else {}
    return found


def _return_free_memory() -> None:
    """Return memory that glibc keeps after the first pass to the system: 100 MB for a million rows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _write_text_rows(
    scanned: ScannedDataset, images: ImageTable, codes: Codes, data: Data, splits: Sequence[_SplitWriter]
) -> Iterator[int]:
    """Write rows without images by batch, ten times as fast as by row; yields the number of rows written."""
    import pyarrow

    again, start = scanned.duplicate_numbers(), 0
    for batch in read_batches(scanned.path):
        end = start + len(batch)
        renamed = {index - start: again[index] for index in range(start, end) if index in again} if again else {}
        if renamed:
            ids = batch.column(0).to_pylist()
            for index, number in renamed.items():
                ids[index] = f"{ids[index]}-{number}"
            batch = batch.set_column(0, batch.schema.field(0), pyarrow.array(ids))
        for code, split in enumerate(splits):
            chosen = codes[start:end] == code
            rows = batch.filter(pyarrow.array(chosen))
            split.writer.write_batch(rows)
            split.datasets.update(rows.column("dataset").to_pylist() if data.parts else ())
            for line in scanned.lines[start:end][chosen]:
                split.add_line(bytes(line))
        start = end
        yield end


def _write_image_rows(
    scanned: ScannedDataset, images: ImageTable, codes: Codes, data: Data, splits: Sequence[_SplitWriter]
) -> Iterator[int]:
    """Write rows with images, animated ones once per chosen frame; yields the number of rows written."""
    again = scanned.duplicate_numbers()
    for index, (row, code) in enumerate(zip(scanned.rows, codes.tolist(), strict=True)):
        if code >= 0:
            name = f"{row.id}-{again[index]}" if index in again else row.id
            digest, frames = images.find(int(scanned.images[index])) if row.image else ("", 1)
            chosen = choose_frames(frames, data.frames)
            others = [images.find(hash_text(image))[0] for image in row.other_images]
            for frame in chosen:
                shown = f"{name}#{frame}" if len(chosen) > 1 else name
                splits[code].add(replace(row, id=shown, frame=frame, digest=digest, other_digests=others))
        yield index + 1
