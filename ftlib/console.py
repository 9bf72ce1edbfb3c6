"""What a person sees while ftlib works: plain lines on stderr, and progress.

On a terminal progress is a bar; in a log file it is a line now and then. Only the first rank of a job speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0
LINES_PER_TASK = 20

_bars: Progress | None = None
"""What is on the terminal now."""

Update = Callable[[int, str], None]
"""Called with the number of finished units and what to say of the last one."""


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as Slurm counts the tasks of a step."""
    return int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def speaks() -> bool:
    """Whether this process is the first rank of its job (or the only one)."""
    return ranks()[0] == 0


def say(text: str) -> None:
    """Print a line on stderr."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Update]:
    """Show how far a task of `total` units is; 0: nobody knows how many there will be.

    Yields:
        A function to call after each unit with (finished units, text).
    """
    if not speaks():
        yield lambda done, text: None
    elif sys.stderr.isatty():
        with _bar(label, total, start) as update:
            yield update
    else:
        yield _lines(label, total)


@contextlib.contextmanager
def _bar(label: str, total: int, start: int) -> Iterator[Update]:
    """A task within another (questions asked in training) has its bar below the other's, as long as it lasts."""
    global _bars
    outer = _bars
    bars = _bars = outer or _new_bars()
    try:
        with contextlib.nullcontext() if outer else bars:
            task = bars.add_task(label, total=total, completed=start, text="")
            yield lambda done, text: bars.update(task, completed=done, text=text)
            if outer:
                bars.remove_task(task)
    finally:
        _bars = outer


def _new_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


def _lines(label: str, total: int) -> Update:
    """Print the first, the last, about `LINES_PER_TASK` between them if they take long, and one at least every 30 s."""
    every = max(1, total // LINES_PER_TASK)
    of = f"/{total}" if total else ""
    last = time.monotonic() - SECONDS_BETWEEN_LINES

    def update(done: int, text: str) -> None:
        nonlocal last
        quiet = time.monotonic() - last
        if (total and done >= total) or quiet >= SECONDS_BETWEEN_LINES or (total and done % every == 0 and quiet >= 1):
            last = time.monotonic()
            say(f"{label}: {done}{of}   {text}".rstrip())

    return update


def tracked(items: Sequence[T], label: str) -> Iterable[T]:
    """Go through items and show how far."""
    with progress(label, len(items)) as update:
        for number, item in enumerate(items, 1):
            yield item
            update(number, "")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """A plain text table; the first column and those in `words` to the left, the others to the right."""
    cells = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        left = [headers[0], *words]
        cells = zip(headers, row, widths, strict=True)
        aligned = [cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in cells]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])
