"""Summary of a dataset as plain lines, for `prepare --check`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ftlib.config.schema import Data
from ftlib.core import log
from ftlib.data.labels import suspicious_labels
from ftlib.data.prepare import ContentGroups, ImageTable, check_images, exclusion_codes, find_content_groups
from ftlib.data.prompts import render_prompt
from ftlib.data.scan import RowTransform, ScannedDataset, TaskRules, sample, scan_source
from ftlib.data.sources.image_references import without_writing
from ftlib.data.splits import SPLITS, Codes, hash_text

SAMPLED = 2_000
SHOWN = 8
LengthFunction = Callable[[str], int]


def describe_dataset(
    data: Data, task: TaskRules, length: LengthFunction, unit: str, encode: RowTransform | None = None
) -> str:
    """Read every row, decode every image, and return the summary; nothing is stored.

    Args:
        task, encode: see `scan.scan_source`.
        length: returns the length of a text in `unit`.

        Raises:
            UserError: invalid rows or images, unless they are skipped; impossible splits.
    """
    with tempfile.TemporaryDirectory() as folder, without_writing():
        scanned = scan_source(data, Path(folder) / "rows.arrow", task, encode)
        images = check_images(scanned, data, task)
        contents = find_content_groups(scanned, images, data.split)
        codes = scanned.assign_splits(
            data.split, contents.groups, contents.names, exclusion_codes(scanned, images, data)
        )
        lines = [
            *_rows(scanned, codes, contents),
            *_images(images, contents),
            *_texts(scanned, data, length, unit),
            *_answers(scanned),
            *_labels(scanned, task),
        ]
    return log.format_table(["what", "found"], [list(line) for line in lines])


def _rows(scanned: ScannedDataset, codes: Codes, contents: ContentGroups) -> Iterator[tuple[str, str]]:
    yield "rows", f"{len(scanned.rows):,}"
    yield from ((f"  of part {name}", f"{count:,}") for name, count in scanned.sizes.items() if name)
    yield "invalid records", f"{scanned.invalid.count:,}"
    for code, split in enumerate(SPLITS):
        yield split, f"{int((codes == code).sum()):,}"
    content = np.fromiter(
        (hash_text("\0".join((*r.images, r.prefix, r.suffix))) for r in scanned.rows), dtype=np.uint64
    )
    yield "duplicates (image, prompt and answer)", f"{len(content) - len(np.unique(content)):,}"
    together = contents.counted
    yield "kept together (same content)", f"{together['rows']:,} rows in {together['groups']:,} groups"


def _images(images: ImageTable, contents: ContentGroups) -> Iterator[tuple[str, str]]:
    yield "images", f"{len(images.names):,}"
    yield "  of the same content", f"{len(images.digests) - len(np.unique(images.digests)):,}"
    if near := contents.counted.get("near"):
        pairs = ", ".join(" ~ ".join(pair) for pair in near["shown"])
        yield "  near-duplicates", f"{near['images']:,} in {near['groups']:,} groups: {pairs}"
    yield "  animated", f"{int((images.frames > 1).sum()):,}"
    shown = ", ".join(sorted(images.one_color)[:SHOWN])
    yield "  of one color", f"{len(images.one_color):,}" + (f": {shown}" if shown else "")
    yield "  formats", _most_common(images.kinds)
    yield "  sizes", _most_common(Counter({f"{width} × {height}": n for (width, height), n in images.sizes.items()}))


def _texts(scanned: ScannedDataset, data: Data, length: LengthFunction, unit: str) -> Iterator[tuple[str, str]]:
    rows = sample(scanned.rows, SAMPLED)
    yield f"prompt, {unit}", _length_statistics(length(render_prompt(row, data.templates)) for row in rows)
    yield f"answer, {unit}", _length_statistics(length(row.suffix) for row in rows)


def _answers(scanned: ScannedDataset) -> Iterator[tuple[str, str]]:
    counts = scanned.labels or Counter()
    yield "different answers", f"{len(counts):,}" if counts else "more than 10,000"
    if counts:
        yield "  most frequent", _most_common(counts)


def _labels(scanned: ScannedDataset, task: TaskRules) -> Iterator[tuple[str, str]]:
    yield from (("remark", told) for told in scanned.remarks)
    if task.closed_labels:
        yield from (("labels", told) for told in suspicious_labels(scanned.labels or {}))


def _length_statistics(lengths: Iterable[int]) -> str:
    values = np.fromiter(lengths, dtype=np.int64)
    low, middle, high, most = np.quantile(values, [0, 0.5, 0.95, 1]).round().astype(int)
    return f"min {low}, median {middle}, 95th percentile {high}, max {most} ({len(values):,} rows)"


def _most_common(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name!s:.40} {count:,}" for name, count in counts.most_common(SHOWN))
    return shown + (f", {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")
