"""Print the end of a run's log: the newest file that a start or a job of it has written."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ftlib import command_line, files, runs
from ftlib.errors import UserError
from ftlib.runs import Run
from ftlib.site import find_site

_POLL_SECONDS = 0.5
_BLOCK = 1 << 16


def main(argv: list[str]) -> int:
    """`ftlib logs RUN [-f] [-n LINES]`"""
    command = command_line.parser("logs", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command.add_argument("-f", "--follow", action="store_true", help="go on printing what is added, until Ctrl-C")
    command.add_argument("-n", "--lines", metavar="N", type=int, default=50, help="lines to begin with; default: 50")
    parsed = command.parse_args(argv)
    run = runs.find_run(parsed.run, find_site())
    path = _newest_log(run)
    position = _print_tail(path, parsed.lines)
    if parsed.follow:
        _follow(run, path, position)
    return 0


def _newest_log(run: Run) -> Path:
    """The log of the newest start, or submission, that has written one.

    Raises:
        UserError: none is known, none has been written yet, or it has been removed.
    """
    events = files.read_jsonl_log(run.history)
    known = [Path(event["log"]) for event in events if event.get("log")]
    if not known:
        raise UserError(
            f"{run.folder}: no log file is known of it",
            "It has not started yet, or its output went to a terminal; jobs write to logs/ where they were submitted.",
        )
    for path in reversed(known):
        if path.is_file():
            return path
    if events[-1]["event"] == "submitted":
        raise UserError(f"{run.folder}: has not started yet", "ftlib status tells what it waits for.")
    raise UserError(f"{known[-1]}: the log of {run.folder} is not there any more")


def _print_tail(path: Path, lines: int) -> int:
    """Print the last lines of a file, read from its end, and return where it ends."""
    text = b""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0 and text.count(b"\n") <= lines:
            step = min(_BLOCK, position)
            position = file.seek(position - step)
            text = file.read(step) + text
    _print(b"".join(text.splitlines(keepends=True)[-lines:] if lines > 0 else []))
    return end


def _follow(run: Run, path: Path, position: int) -> None:
    """Print what is added; a run that is submitted again goes on in another file."""
    while True:
        with path.open("rb") as file:
            file.seek(position)
            added = file.read()
        position += len(added)
        _print(added)
        if not added:
            time.sleep(_POLL_SECONDS)
            newest = _newest_log(run)
            if newest != path:
                path, position = newest, 0


def _print(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
