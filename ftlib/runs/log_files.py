"""Log files of runs: which may be read, and the line in them that says why a job ended."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path

from ftlib.core.paths import REPOSITORY
from ftlib.errors import UserError
from ftlib.runs.run import Run

_TAIL_BYTES = 1 << 14
_LONGEST_LINE = 300
_OWN_PREFIX = "ftlib: "
_JOB_LOG = re.compile(r"ftlib(-[a-z]+)?-\d+\.log")
"""Output of jobs/*.sbatch, which is in the folder where sbatch was called."""
_ERROR = re.compile(r"error|cannot|fail|denied|not found|no such", re.IGNORECASE)


def in_log_folder(path: Path, run: Run) -> Path:
    """Return the resolved path of a log: another user may have written the run's history, which names it.

    Raises:
        UserError: it is not in a log folder, also through a link, nor named as those of jobs/*.sbatch.
    """
    real, own = path.resolve(), run.folder.parent.name
    known = [run.folder, *(place / "logs" for place in (_working_folder(), REPOSITORY) if place)]
    above = real.parent.parent if real.parent.name == own else real.parent
    if (
        above.name != "logs"
        and not _JOB_LOG.fullmatch(real.name)
        and not any(real.is_relative_to(folder.resolve()) for folder in known)
    ):
        remedy = f"If you trust the history of {run.folder}, look at the file itself: tail -f {shlex.quote(str(path))}"
        raise UserError(f"{path}: not shown: it is not in a log folder", remedy)
    return real


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was deleted
        return None


def last_error(path: Path, run: Run) -> str:
    """Return the line at the end of a job's log that says why it ended: ftlib's last message, else the last error, else
    the last line; "" if there is none, or the file may not be shown.
    """
    with contextlib.suppress(OSError, UserError):
        real = in_log_folder(path, run)
        if not real.is_file():
            return ""
        with real.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        own = [line.removeprefix(_OWN_PREFIX) for line in lines if line.startswith(_OWN_PREFIX)]
        errors = [line for line in lines if _ERROR.search(line)]
        return next((found[-1][:_LONGEST_LINE] for found in (own, errors, lines) if found), "")
    return ""
