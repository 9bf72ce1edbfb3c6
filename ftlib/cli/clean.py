"""Free disk space: list what would be deleted, with sizes, ask, and delete it.

Deletes checkpoints of finished runs, leftovers of killed processes, folders of runs that were never started and, unless
runs are given, cached row lengths of deleted data and the code that ended jobs were submitted with. With --runs: the
whole folders of the given runs, or of runs that were not active for --older-than days. Queued and running runs are
never deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import stat
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
from ftlib.slurm import intents
from ftlib.slurm import status as slurm_status
from ftlib.slurm.client import Job, Slurm, SlurmUnavailable
from ftlib.slurm.replace import finish_interrupted

_DAY = 86400


@dataclass(frozen=True)
class CleanupCandidate:
    """Files that can be deleted.

    Attributes:
        run: their run; None: the store.
        description: a word or two.
        folders: files and folders to delete.
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
    command.add_argument("--runs", action="store_true", help="whole runs, including results and scores")
    command.add_argument(
        "--older-than", metavar="DAYS", type=_days, default=0.0, help="only what was inactive for this long"
    )
    command.add_argument("--yes", action="store_true", help="do not ask")
    parsed = command.parse_args(argv)
    if parsed.runs and not (parsed.chosen or parsed.older_than):
        raise UserError("clean --runs would delete every run", "Give runs, or --older-than DAYS.")
    site = find_site()
    _settle(site)
    finish_interrupted(site)
    before = time.time() - parsed.older_than * _DAY
    old = [run for run in runs.find_runs(parsed.chosen, site) if _last_activity(run) <= before]
    found = [candidate for run in _idle_runs(old, site) for candidate in _find_candidates(run, parsed.runs)]
    if not parsed.chosen:
        found += [*_unused_in_store(site, before), *_code_of_ended_jobs(site, before)]
    if not found:
        log.info("nothing to free")
    elif _confirm(found, site, parsed.yes):
        log.info(f"{format_size(sum(_delete(candidate, site) for candidate in found))} freed")
    return 0


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (days := float(text)) < math.inf:
            return days
    raise argparse.ArgumentTypeError(f"{text}: must be a number of days")


def _settle(site: Site) -> None:
    """Find out which runs an interrupted `submit` has sent; `finish_interrupted` restores the others.

    Raises:
        UserError: Slurm does not respond.
    """
    try:
        intents.settle_interrupted(site, Slurm())
    except SlurmUnavailable as error:
        raise UserError(f"cannot check an interrupted submission: {error}", error.remedy) from None


def _last_activity(run: Run) -> float:
    """Return the time of a run's last activity or submission."""
    return max(
        events.last_activity(run), *(path.stat().st_mtime for path in (run.config_file, run.history) if path.exists())
    )


def _idle_runs(chosen: Sequence[Run], site: Site) -> Iterator[Run]:
    """Yield runs that are neither running nor queued; reports the others."""
    jobs = _known_jobs(chosen)
    now = storage_time(site.runs)
    for run in chosen:
        found = slurm_status.run_status(run, site, now, jobs)
        if found.state in ("running", "evaluating", "queued"):
            log.warning(f"{found.run}: skipped ({found.state})")
        else:
            yield run


def _known_jobs(chosen: Sequence[Run]) -> dict[str, Job]:
    """Return the jobs of unfinished runs from Slurm.

    Raises:
        UserError: Slurm does not respond, and some runs may be queued.
    """
    numbers = [number for run in chosen for number in slurm_status.open_jobs(run)]
    try:
        return Slurm().jobs(numbers)
    except SlurmUnavailable as error:
        problem = f"cannot check whether runs are queued: {error}"
        raise UserError(problem, "Run it where Slurm is available, or give runs that are done.") from None


def _find_candidates(run: Run, whole: bool) -> Iterator[CleanupCandidate]:
    if runs.is_unused(run) and not whole:
        if time.time() - run.folder.stat().st_mtime > _DAY:  # else it may be about to start
            yield CleanupCandidate(run, "never started", [run.folder], _disk_usage(run.folder))
        return
    checkpoints = run.folder / "checkpoints"
    finished = [checkpoints] if run.done_marker.exists() and checkpoints.exists() else []
    left = [path for path in run.folder.rglob(f"*{files.TEMPORARY_PREFIX}*") if not set(finished) & set(path.parents)]
    for what, folders in [("all of it", [run.folder])] if whole else [("checkpoints", finished), ("leftovers", left)]:
        if folders:
            yield CleanupCandidate(run, what, folders, sum(map(_disk_usage, folders)))


def _unused_in_store(site: Site, before: float) -> Iterator[CleanupCandidate]:
    """Yield unused files of the store that this user may delete."""
    unused = [path for path in unused_lengths(site, storage_time(site.runs)) if path.lstat().st_mtime <= before]
    if unused and os.access(unused[0].parent, os.W_OK):
        yield CleanupCandidate(None, "lengths of rows", unused, sum(map(_disk_usage, unused)))


def _code_of_ended_jobs(site: Site, before: float) -> Iterator[CleanupCandidate]:
    """Yield snapshots of the code (see `runs/pinning.py`), if this user has no jobs that may use them."""
    folder, latest = site.runs / ".jobs", min(before, time.time() - _DAY)
    found = [path for path in folder.glob("*") if path.is_dir() and path.lstat().st_mtime <= latest]
    if not found:
        return
    try:
        if Slurm().has_jobs():
            log.info(f"the code of jobs in {folder} is kept while you have jobs that are queued or running")
            return
    except SlurmUnavailable as error:
        log.info(f"the code of jobs in {folder} is kept: {error}")
        return
    yield CleanupCandidate(None, "code of ended jobs", found, sum(map(_disk_usage, found)))


def _disk_usage(path: Path) -> int:
    """Return the disk usage of a file or folder in bytes."""
    total = 0
    for each in [path, *([] if path.is_symlink() else path.rglob("*"))]:
        with contextlib.suppress(FileNotFoundError):
            status = each.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def _confirm(found: Sequence[CleanupCandidate], site: Site, yes: bool) -> bool:
    """Show what would be deleted; ask for confirmation unless `yes`."""
    rows = [[runs.run_name(one.run, site) if one.run else "–", one.description, format_size(one.size)] for one in found]
    rows.append(["together", "", format_size(sum(one.size for one in found))])
    log.print_result(log.format_table(["run", "what", "size"], rows, ["what"]))
    return yes or log.ask("Delete all this?", "Add --yes to delete all this.")


def _delete(candidate: CleanupCandidate, site: Site) -> int:
    """Delete files while holding the run's lease; return the number of freed bytes."""
    if candidate.run is None:
        for path in candidate.folders:
            _remove(path)
        return candidate.size
    try:
        with acquire_lease(candidate.run.folder):
            for folder in candidate.folders:
                _remove(folder)
    except UserError as error:
        log.warning(f"{runs.run_name(candidate.run, site)}: skipped: {error.problem}")
        return 0
    return candidate.size


def _remove(path: Path) -> None:
    """Delete a file or folder; a run's config.yaml comes last, so that a killed deletion can be repeated.

    Links are deleted, but not their targets, which may be shared.
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
