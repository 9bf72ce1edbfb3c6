"""Free space: shows what would go and how large it is, asks, and then deletes it.

Goes: checkpoints of finished runs, what killed writers left and, unless runs are named, the cached row lengths of data
that are gone. With --runs the whole folders of the runs that are named or that nothing has touched for --older-than
days. A run that is queued or at work is never touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlib.cli import arguments
from ftlib.core import files, log
from ftlib.core.lease import acquire_lease, storage_time
from ftlib.core.paths import Site, find_site
from ftlib.core.text import format_size
from ftlib.data.dataset import unused_lengths
from ftlib.errors import UserError
from ftlib.runs import events
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.slurm import status as slurm_status
from ftlib.slurm.client import Job, Slurm, SlurmUnavailable
from ftlib.slurm.replace import finish_interrupted

_DAY = 86400


@dataclass(frozen=True)
class CleanupCandidate:
    """Something that may go.

    Attributes:
        run: that it belongs to; None: to the store.
        description: in a word or two.
        folders: what is deleted.
        size: bytes on the disk.
    """

    run: Run | None
    description: str
    folders: Sequence[Path]
    size: int


def main(argv: list[str]) -> int:
    """`ftlib clean [RUN…] [--runs] [--older-than DAYS] [--yes]`"""
    command = arguments.make_parser("clean", __doc__)
    command.add_argument("chosen", metavar="RUN", nargs="*", help="run folders or names; default: all")
    command.add_argument("--runs", action="store_true", help="whole runs, results and scores included")
    command.add_argument("--older-than", metavar="DAYS", type=float, default=0.0, help="only what is untouched so long")
    command.add_argument("--yes", action="store_true", help="do not ask")
    parsed = command.parse_args(argv)
    if parsed.runs and not (parsed.chosen or parsed.older_than):
        raise UserError("clean --runs would delete every run", "Name runs, or say --older-than DAYS.")
    site = find_site()
    finish_interrupted(site)
    before = time.time() - parsed.older_than * _DAY
    old = [run for run in runs.find_runs(parsed.chosen, site) if _last_activity(run) <= before]
    found = [candidate for run in _idle_runs(old, site) for candidate in _find_candidates(run, parsed.runs)]
    if not parsed.chosen:
        found += _unused_in_store(site, before)
    if not found:
        log.info("nothing to free")
    elif _confirm(found, site, parsed.yes):
        log.info(f"{format_size(sum(_delete(candidate, site) for candidate in found))} freed")
    return 0


def _last_activity(run: Run) -> float:
    """When a run last showed life or was submitted."""
    return max(
        events.last_activity(run), *(path.stat().st_mtime for path in (run.config_file, run.history) if path.exists())
    )


def _idle_runs(chosen: Sequence[Run], site: Site) -> Iterator[Run]:
    """Runs that neither live nor wait; the others are named."""
    jobs = _known_jobs(chosen)
    now = storage_time(site.runs)
    for run in chosen:
        found = slurm_status.run_status(run, site, now, jobs)
        if found.state in ("running", "evaluating", "queued"):
            log.warning(f"{found.run}: left alone, it is {found.state}")
        else:
            yield run


def _known_jobs(chosen: Sequence[Run]) -> dict[str, Job]:
    """What Slurm says of the jobs of runs that are not over.

    Raises:
        UserError: it does not answer, and some of them may be queued.
    """
    numbers = [number for run in chosen for number in slurm_status.open_jobs(run)]
    try:
        return Slurm().jobs(numbers)
    except SlurmUnavailable as error:
        problem = f"whether runs are queued cannot be told: {error}"
        raise UserError(problem, "Run it where Slurm answers, or name runs that are done.") from None


def _find_candidates(run: Run, whole: bool) -> Iterator[CleanupCandidate]:
    checkpoints = run.folder / "checkpoints"
    finished = [checkpoints] if run.done_marker.exists() and checkpoints.exists() else []
    left = [path for path in run.folder.rglob(f"*{files.TEMPORARY_PREFIX}*") if not set(finished) & set(path.parents)]
    for what, folders in [("all of it", [run.folder])] if whole else [("checkpoints", finished), ("leftovers", left)]:
        if folders:
            yield CleanupCandidate(run, what, folders, sum(map(_disk_usage, folders)))


def _unused_in_store(site: Site, before: float) -> Iterator[CleanupCandidate]:
    """What can be removed from the store without anybody missing it, if this user may."""
    unused = [path for path in unused_lengths(site, storage_time(site.runs)) if path.lstat().st_mtime <= before]
    if unused and os.access(unused[0].parent, os.W_OK):
        yield CleanupCandidate(None, "lengths of rows", unused, sum(map(_disk_usage, unused)))


def _disk_usage(path: Path) -> int:
    """What a file or folder takes on the disk."""
    total = 0
    for each in [path, *([] if path.is_symlink() else path.rglob("*"))]:
        with contextlib.suppress(FileNotFoundError):
            status = each.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def _confirm(found: Sequence[CleanupCandidate], site: Site, yes: bool) -> bool:
    """Show what would go; ask, unless that has been answered."""
    rows = [
        [runs.run_name(one.run, site) if one.run else "store", one.description, format_size(one.size)] for one in found
    ]
    rows.append(["together", "", format_size(sum(one.size for one in found))])
    log.print_result(log.format_table(["run", "what", "size"], rows, ["what"]))
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("not a terminal, so ftlib cannot ask for confirmation", "Add --yes to delete all this.")
    return input("Delete all this? [y/N] ").strip().lower() in ("y", "yes")


def _delete(candidate: CleanupCandidate, site: Site) -> int:
    """Delete while nobody else can begin to work on the run; the bytes that were freed."""
    if candidate.run is None:
        for path in candidate.folders:
            path.unlink(missing_ok=True)
        return candidate.size
    try:
        with acquire_lease(candidate.run.folder):
            for folder in candidate.folders:
                _remove(folder)
    except UserError as error:
        log.warning(f"{runs.run_name(candidate.run, site)}: left alone: {error.problem}")
        return 0
    return candidate.size


def _remove(path: Path) -> None:
    """Delete a file or folder; of a run its config.yaml last, so that a deletion that was killed can be done again.

    Of a link to another place only the link goes: what it leads to may be no run's alone.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name not in ("config.yaml", "owner.json"):
            child.unlink()
    shutil.rmtree(path)
