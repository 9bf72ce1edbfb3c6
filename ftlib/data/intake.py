"""First pass over a dataset: every row checked and put on disk, and of each the few numbers that a split depends on.

Memory: 48 bytes a row, whatever its text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftlib import console
from ftlib.config_data import Data, SplitRule
from ftlib.data.examples import MAX_FAULTS_SHOWN, Bad, Example, compact
from ftlib.data.prompts import prompt_of
from ftlib.data.rows import Rows, RowWriter
from ftlib.data.sources import read_source
from ftlib.data.splits import NO_PART, SPLITS, Codes, Keys, assign, hash_text, keep_images_apart
from ftlib.errors import UserError
from ftlib.tasks import TASKS

MAX_LABELS = 10_000
_NO_IMAGE = 0
_EVERY = 1000

Encode = Callable[[Example | Bad], Example | Bad]


@dataclass
class Intake:
    """What the first pass leaves.

    Attributes:
        path: the rows, as `Rows` reads them.
        images: hash of each row's image, 0 without one, shape (n,).
        sizes: number of rows of each part of a mixture (one after the other); "" → all, if it is none.
        labels: every answer that occurs; None if there are more than `MAX_LABELS`.
        bad: the faulty records, of which the first are kept, and their number.
    """

    path: Path
    keys: Keys
    images: NDArray[np.uint64]
    sizes: dict[str, int]
    labels: list[str] | None
    bad: BadRecords

    @property
    def rows(self) -> Rows:
        """All rows, in the order of the source."""
        return Rows(self.path)

    def divide(self, rule: SplitRule) -> Codes:
        """Which split each row belongs to, see `splits.assign`; each part of a mixture is divided by itself.

        What then shows an image of another split is left out.

        Raises:
            UserError: as `splits.assign`; or every image is asked, and none is left to train on.
        """
        found, start = [], 0
        for name, size in self.sizes.items():
            try:
                found.append(assign(self.keys.between(start, start + size), rule))
            except UserError as error:
                raise UserError(f"part {name}: {error.problem}" if name else error.problem, error.remedy) from None
            start += size
        codes = np.concatenate(found)
        keep_images_apart(codes, self.images)
        for code in (0, 1):
            if not (codes == code).any():
                problem = f"all images of {SPLITS[code]} are asked in another split, too, so that none is left"
                raise UserError(problem, "Give the rows of an image the same part, or set data.split.official: false.")
        return codes


@dataclass
class BadRecords:
    """Records that cannot be used; all are counted, the first are kept in words."""

    stop: bool
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, bad: Bad) -> None:
        """Take note of one."""
        self.count += 1
        if len(self.shown) < MAX_FAULTS_SHOWN:
            self.shown.append(f"{bad.place}: {bad.reason}")

    def settle(self) -> None:
        """Raise UserError if they are to stop the work; otherwise say how many are left out."""
        if not self.count:
            return
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        text = "\n".join([*self.shown, *more])
        if self.stop:
            raise UserError(text, "Mend these records, or leave them out with data.on_bad=skip. Nothing was written.")
        console.say(f"{text}\n{self.count} records cannot be used and are left out")


def take_in(data: Data, path: Path, task: str, encode: Encode | None = None) -> Intake:
    """Read a source once.

    Args:
        path: where the rows are put.
        task: says which rows its metric could not judge; they are faulty, too.
        encode: writes answers in the words that are learned, where the source has another form of them.

    Raises:
        UserError: faulty records (unless they are to be skipped), no rows at all, a prompt that names what rows lack.
    """
    bad = BadRecords(stop=data.on_bad == "stop")
    numbers = {name: array("Q") for name in ("rows", "groups", "strata", "images")}
    parts = array("b")
    labels: set[str] = set()
    sizes = dict.fromkeys(data.datasets, 0)
    templates = data.templates
    with RowWriter(path) as writer, console.progress("reading rows", 0) as update:
        for row in map(TASKS[task].checked, map(encode or _as_it_is, read_source(data, task))):
            if isinstance(row, Bad):
                bad.add(row)
                continue
            if not sizes[row.dataset]:
                prompt_of(row, templates)
            sizes[row.dataset] += 1
            writer.write(compact(row))
            _append(numbers, row, data)
            parts.append(SPLITS.index(row.part) if row.part else NO_PART)
            if len(labels) <= MAX_LABELS:
                labels.add(row.suffix)
            if len(writer) % _EVERY == 0:
                update(len(writer), "")
    bad.settle()
    if empty := [data.datasets[name].root for name, size in sizes.items() if not size]:
        raise UserError(f"{empty[0]}: no rows in it", "Check source, root and file.")
    if TASKS[task].closed and len(labels) > MAX_LABELS:
        problem = f"{data.root}: more than {MAX_LABELS:,} different answers are no closed set of labels"
        raise UserError(problem, "Set another task, or check which column data.columns takes as suffix.")
    columns = {name: np.frombuffer(column, dtype=np.uint64) for name, column in numbers.items()}
    images = columns.pop("images")
    keys = Keys(**columns, parts=np.frombuffer(parts, dtype=np.int8))
    return Intake(path, keys, images, sizes, sorted(labels) if len(labels) <= MAX_LABELS else None, bad)


def first_rows_of_images(intake: Intake) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Every image's hash, ascending, and a row that shows it."""
    names, first = np.unique(intake.images, return_index=True)
    shown = names != _NO_IMAGE
    return names[shown], first[shown]


def sample(rows: Rows, count: int) -> list[Example]:
    """At most `count` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return list(islice((rows[place] for place in range(0, len(rows), step)), count))


def _as_it_is(row: Example | Bad) -> Example | Bad:
    return row


def _append(numbers: dict[str, array[int]], row: Example, data: Data) -> None:
    numbers["rows"].append(hash_text(row.id))
    numbers["groups"].append(hash_text(row.group or row.image or row.id))
    numbers["strata"].append(hash_text(row.suffix) if data.split.stratify_by else 0)
    numbers["images"].append(hash_text(row.image) if row.image else _NO_IMAGE)
