"""What a dataset consists of, as plain lines: for `prepare --check`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ftlib import console
from ftlib.config import Data
from ftlib.data.intake import Encode, Intake, sample, take_in
from ftlib.data.prepared import Images, check_images
from ftlib.data.prompts import prompt_of
from ftlib.data.splits import SPLITS, Codes, hash_text

SAMPLED = 2_000
SHOWN = 8
Length = Callable[[str], int]


def overview(data: Data, task: str, length: Length, unit: str, encode: Encode | None = None) -> str:
    """Read every row and decode every image, and say what is there; nothing is kept.

    Args:
        task, encode: see `intake.take_in`.
        length: how long a text is, in `unit`.

    Raises:
        UserError: faulty rows or images, unless they are to be skipped; impossible splits.
    """
    with tempfile.TemporaryDirectory() as folder:
        intake = take_in(data, Path(folder) / "rows.jsonl", task, encode)
        images = check_images(intake, data)
        codes = intake.divide(data.split)
        lines = [*_rows(intake, codes), *_images(images), *_texts(intake, data, length, unit), *_answers(intake)]
    return console.table(["what", "found"], [list(line) for line in lines])


def _rows(intake: Intake, codes: Codes) -> Iterator[tuple[str, str]]:
    yield "rows", f"{len(intake.rows):,}"
    yield from ((f"  of part {name}", f"{count:,}") for name, count in intake.sizes.items() if name)
    yield "records that are none", f"{intake.bad.count:,}"
    for code, split in enumerate(SPLITS):
        yield split, f"{int((codes == code).sum()):,}"
    content = np.fromiter((hash_text(f"{r.image}\0{r.prefix}\0{r.suffix}") for r in intake.rows), dtype=np.uint64)
    yield "duplicates (image, prompt and answer)", f"{len(content) - len(np.unique(content)):,}"


def _images(images: Images) -> Iterator[tuple[str, str]]:
    yield "images", f"{len(images.names):,}"
    yield "  of the same content", f"{len(images.digests) - len(np.unique(images.digests)):,}"
    yield "  animated", f"{int((images.frames > 1).sum()):,}"
    shown = ", ".join(sorted(images.one_color)[:SHOWN])
    yield "  of one color", f"{len(images.one_color):,}" + (f": {shown}" if shown else "")
    yield "  formats", _most_common(images.kinds)
    yield "  sizes", _most_common(Counter({f"{width} × {height}": n for (width, height), n in images.sizes.items()}))


def _texts(intake: Intake, data: Data, length: Length, unit: str) -> Iterator[tuple[str, str]]:
    rows = sample(intake.rows, SAMPLED)
    yield f"prompt, {unit}", _spread(length(prompt_of(row, data.templates)) for row in rows)
    yield f"answer, {unit}", _spread(length(row.suffix) for row in rows)


def _answers(intake: Intake) -> Iterator[tuple[str, str]]:
    counts = Counter(row.suffix for row in intake.rows) if intake.labels else Counter()
    yield "different answers", f"{len(counts):,}" if counts else "more than 10,000"
    if counts:
        yield "  most frequent", _most_common(counts)


def _spread(lengths: Iterable[int]) -> str:
    values = np.fromiter(lengths, dtype=np.int64)
    low, middle, high, most = np.quantile(values, [0, 0.5, 0.95, 1]).round().astype(int)
    return f"least {low}, median {middle}, 95 % up to {high}, most {most} ({len(values):,} rows)"


def _most_common(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name!s:.40} {count:,}" for name, count in counts.most_common(SHOWN))
    return shown + (f", {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")
