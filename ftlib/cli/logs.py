"""Print the end of a run's log: the newest log file of its starts and jobs.

Log files are in the run folder, in `logs/` of the current or ftlib's folder, or in any folder of that name. Those of
jobs/*.sbatch (ftlib-train-JOB.log) can be anywhere. Other files are not shown, because another user may have written
the run's history.
"""

from __future__ import annotations

import codecs
import os
import time
from pathlib import Path

from ftlib.cli import arguments
from ftlib.core import jsonl, log
from ftlib.core.paths import Site, find_site
from ftlib.errors import UserError
from ftlib.runs import run as runs
from ftlib.runs.log_files import in_log_folder
from ftlib.runs.run import Run
from ftlib.slurm.status import NEVER_BEGUN, run_statuses

_POLL_SECONDS = 0.5
_QUIET_SECONDS = 5.0
"""Without new output for this long, it is checked whether the run has ended."""
_SECONDS_BETWEEN_CHECKS = 30.0
_ENDED = ("done", "failed", "diverged", "stopped", "cancelled", "died", NEVER_BEGUN)
_BLOCK = 1 << 16


def main(argv: list[str]) -> int:
    """`ftlib logs RUN [-f] [-n LINES]`"""
    command = arguments.make_parser("logs", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command.add_argument("-f", "--follow", action="store_true", help="print new output until the run has ended")
    command.add_argument("-n", "--lines", metavar="N", type=int, default=50, help="number of last lines; default: 50")
    parsed = command.parse_args(argv)
    site = find_site()
    run = runs.find_run(parsed.run, site)
    path = _newest_log(run)
    screen = _Screen()
    position = _print_tail(path, parsed.lines, screen)
    if parsed.follow:
        _follow(run, site, path, position, screen)
    return 0


def _newest_log(run: Run) -> Path:
    """Return the log of the newest start or submission that has one.

    Raises:
        UserError: there is none, it does not exist yet or any more, or it is not in a log folder.
    """
    events = jsonl.read_jsonl_log(run.history)
    known = [Path(event["log"]) for event in events if event.get("log")]
    if not known:
        raise UserError(
            f"{run.folder}: has no log file",
            "It has not started yet, or its output went to a terminal; jobs write where they were submitted.",
        )
    for path in reversed(known):
        if path.is_file():
            return in_log_folder(path, run)
    if events[-1]["event"] in ("submitted", "report submitted"):
        raise UserError(f"{run.folder}: has not started yet", "See ftlib status for the reason.")
    raise UserError(f"{known[-1]}: the log of {run.folder} no longer exists")


class _Screen:
    """Prints bytes incrementally; characters may be split between writes. Progress bars become lines."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, text: bytes) -> None:
        log.print_result(self._decoder.decode(text).replace("\r\n", "\n").replace("\r", "\n"), end="")


def _print_tail(path: Path, lines: int, screen: _Screen) -> int:
    """Print the last lines of a file, read from its end, and return where it ends."""
    text = b""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0 and text.count(b"\n") <= lines:
            step = min(_BLOCK, position)
            position = file.seek(position - step)
            text = file.read(step) + text
    screen.write(b"".join(text.splitlines(keepends=True)[-lines:] if lines > 0 else []))
    return end


def _follow(run: Run, site: Site, path: Path, position: int, screen: _Screen) -> None:
    """Print new output until the run has ended; a resubmitted run continues in another file."""
    next_check = time.monotonic() + _QUIET_SECONDS
    while True:
        with path.open("rb") as file:
            file.seek(position)
            added = file.read()
        position += len(added)
        screen.write(added)
        if added:
            next_check = time.monotonic() + _QUIET_SECONDS
            continue
        if time.monotonic() > next_check:
            (found,) = run_statuses([run], site)
            if found.state in _ENDED and path.stat().st_size == position:
                log.info(f"{found.run}: {found.state}{f': {found.reason}' if found.reason else ''}")
                return
            next_check = time.monotonic() + _SECONDS_BETWEEN_CHECKS
        time.sleep(_POLL_SECONDS)
        newest = _newest_log(run)
        if newest != path:
            path, position = newest, 0
