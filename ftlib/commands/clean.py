"""Free space: shows what would go and how large it is, asks, and then deletes it.

Goes: checkpoints of finished runs and what killed writers left. With --runs the whole folders of the runs that are
named or that nothing has touched for --older-than days. A run that is queued or at work is never touched.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlib import command_line, console, files, history, runs
from ftlib.errors import UserError
from ftlib.ownership import owned, storage_time
from ftlib.reporting import standing
from ftlib.runs import Run
from ftlib.site import Site, find_site
from ftlib.submission.replace import finish_interrupted
from ftlib.submission.slurm import Job, Slurm, Unreachable

_DAY = 86400


@dataclass(frozen=True)
class Waste:
    """Something that may go.

    Attributes:
        run: that it belongs to.
        what: in a word or two.
        folders: what is deleted.
        size: bytes on the disk.
    """

    run: Run
    what: str
    folders: Sequence[Path]
    size: int


def main(argv: list[str]) -> int:
    """`ftlib clean [RUN…] [--runs] [--older-than DAYS] [--yes]`"""
    command = command_line.parser("clean", __doc__)
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
    old = [run for run in runs.find_runs(parsed.chosen, site) if _touched(run) <= before]
    found = [waste for run in _idle(old, site) for waste in _waste(run, parsed.runs)]
    if not found:
        console.say("nothing to free")
    elif _agreed(found, site, parsed.yes):
        console.say(f"{_size(sum(_delete(waste, site) for waste in found))} freed")
    return 0


def _touched(run: Run) -> float:
    """When a run last showed life or was submitted."""
    return max(
        history.last_sign(run), *(path.stat().st_mtime for path in (run.config_file, run.history) if path.exists())
    )


def _idle(chosen: Sequence[Run], site: Site) -> Iterator[Run]:
    """Runs that neither live nor wait; the others are named."""
    jobs = _known_jobs(chosen)
    now = storage_time(site.runs)
    for run in chosen:
        found = standing.stand(run, site, now, jobs)
        if found.state in ("running", "evaluating", "queued"):
            console.say(f"{found.run}: left alone, it is {found.state}")
        else:
            yield run


def _known_jobs(chosen: Sequence[Run]) -> dict[str, Job]:
    """What Slurm says of the jobs of runs that are not over.

    Raises:
        UserError: it does not answer, and some of them may be queued.
    """
    numbers = [number for run in chosen for number in standing.open_jobs(run)]
    try:
        return Slurm().jobs(numbers)
    except Unreachable as error:
        problem = f"whether runs are queued cannot be told: {error}"
        raise UserError(problem, "Run it where Slurm answers, or name runs that are done.") from None


def _waste(run: Run, whole: bool) -> Iterator[Waste]:
    checkpoints = run.folder / "checkpoints"
    finished = [checkpoints] if run.done.exists() and checkpoints.exists() else []
    left = [path for path in run.folder.rglob(f"*{files.TEMPORARY}*") if not set(finished) & set(path.parents)]
    for what, folders in [("all of it", [run.folder])] if whole else [("checkpoints", finished), ("leftovers", left)]:
        if folders:
            yield Waste(run, what, folders, sum(map(_bytes, folders)))


def _bytes(path: Path) -> int:
    """What a file or folder takes on the disk."""
    total = 0
    for each in [path, *([] if path.is_symlink() else path.rglob("*"))]:
        with contextlib.suppress(FileNotFoundError):
            status = each.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def _agreed(found: Sequence[Waste], site: Site, yes: bool) -> bool:
    """Show what would go; ask, unless that has been answered."""
    rows = [[runs.handle(one.run, site), one.what, _size(one.size)] for one in found]
    rows.append(["together", "", _size(sum(one.size for one in found))])
    print(console.table(["run", "what", "size"], rows, ["what"]))
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked", "Add --yes to delete all this.")
    return input("Delete all this? [y/N] ").strip().lower() in ("y", "yes")


def _delete(waste: Waste, site: Site) -> int:
    """Delete while nobody else can begin to work on the run; the bytes that were freed."""
    try:
        with owned(waste.run.folder):
            for folder in waste.folders:
                _remove(folder)
    except UserError as error:
        console.say(f"{runs.handle(waste.run, site)}: left alone: {error.problem}")
        return 0
    return waste.size


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


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
