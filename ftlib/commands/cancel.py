"""Cancel runs by name: what waits is dropped, what runs saves and ends. They stay cancelled until submitted again."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import time
from collections.abc import Sequence

from ftlib import command_line, console, files, runs
from ftlib.errors import UserError
from ftlib.ownership import living_owner, storage_time
from ftlib.reporting import standing
from ftlib.runs import Run
from ftlib.site import Site, find_site
from ftlib.submission.slurm import WAITING, Slurm, Unreachable

_TRIES = 5


def main(argv: list[str]) -> int:
    """`ftlib cancel RUN…`"""
    command = command_line.parser("cancel", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folders or names; a name means all its runs")
    parsed = command.parse_args(argv)
    site = find_site()
    chosen = runs.find_runs(parsed.runs, site)
    slurm = Slurm()
    try:
        events = {run: files.read_jsonl_log(run.history) for run in chosen}
        numbers = {run: standing.own_jobs(each) for run, each in events.items()}
        known = slurm.jobs([number for each in numbers.values() for number in each])
        alive = {run: [one for one in each if one in known and known[one].alive] for run, each in numbers.items()}
        cancelled = [run for run in chosen if _cancel(run, alive[run], standing.waits_here(events[run]), site)]
        _scancel(slurm, [number for run in cancelled for number in alive[run]])
    except Unreachable as error:
        raise UserError(f"Slurm cannot be asked to cancel: {error}", "Try again when it answers.") from None
    if not cancelled:
        console.say("nothing to cancel: none of these runs is queued or running")
    return 0


def _cancel(run: Run, jobs: Sequence[str], waits: bool, site: Site) -> bool:
    """Note the cancellation, for status and for the process of this machine that would come to a run that waits for it.

    What runs on this machine without Slurm is ended.
    """
    name = runs.handle(run, site)
    owner = living_owner(run.folder, storage_time(run.folder))
    here = owner is not None and owner["job"] is None and owner["host"] == runs.host_name()
    if not jobs and not here and not waits:
        if owner:
            console.say(f"{name}: is at work as process {owner['pid']} on {owner['host']}; cancel it there")
        return False
    run.note("cancelled", by=getpass.getuser(), job=None)
    if owner and here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner["pid"], signal.SIGTERM)
    what = ", ".join(f"job {job}" for job in jobs) or ("its process" if here else "before its turn")
    console.say(f"{name}: cancelled {what}")
    return True


def _scancel(slurm: Slurm, jobs: Sequence[str]) -> None:
    """Cancel, and once more what was just being requeued and waits again."""
    waiting = list(jobs)
    for _ in range(_TRIES):
        if not waiting:
            return
        slurm.cancel(waiting)
        time.sleep(1)
        waiting = [number for number, job in slurm.jobs(waiting).items() if job.last.state in WAITING]
