"""Cancel runs: what waits is dropped, what runs saves and ends. They stay cancelled until they are submitted again."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import time
from collections.abc import Sequence

from ftlib.core import environment, jsonl, log
from ftlib.core.lease import current_holder, storage_time
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.slurm import status
from ftlib.slurm.client import WAITING, Slurm, SlurmUnavailable

_TRIES = 5


def cancel_runs(chosen: Sequence[Run], site: Site) -> list[Run]:
    """Cancel runs, in Slurm and on this machine.

    Returns:
        Those that were queued or running.

    Raises:
        UserError: Slurm does not answer.
    """
    slurm = Slurm()
    try:
        events = {run: jsonl.read_jsonl_log(run.history) for run in chosen}
        numbers = {run: status.own_jobs(each) for run, each in events.items()}
        known = slurm.jobs([number for each in numbers.values() for number in each])
        alive = {run: [one for one in each if one in known and known[one].is_active] for run, each in numbers.items()}
        cancelled = [run for run in chosen if _cancel(run, alive[run], status.waits_locally(events[run]), site)]
        _scancel(slurm, [number for run in cancelled for number in alive[run]])
    except SlurmUnavailable as error:
        raise UserError(f"Slurm cannot cancel: {error}", "Try again when it responds.") from None
    return cancelled


def _cancel(run: Run, jobs: Sequence[str], waits: bool, site: Site) -> bool:
    """Record the cancellation for `status` and for local workers, and end a process of this machine."""
    name = runs.run_name(run, site)
    owner = current_holder(run.folder, storage_time(run.folder))
    here = owner is not None and owner["job"] is None and owner["host"] == environment.host_name()
    if not jobs and not here and not waits:
        if owner:
            log.warning(f"{name}: running as process {owner['pid']} on {owner['host']}; cancel it there")
        return False
    run.log_event("cancelled", by=getpass.getuser(), job=None)
    if owner and here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner["pid"], signal.SIGTERM)
    what = ", ".join(f"job {job}" for job in jobs) or ("its process" if here else "before its turn")
    log.info(f"{name}: cancelled {what}")
    return True


def _scancel(slurm: Slurm, jobs: Sequence[str]) -> None:
    """Cancel jobs, and again those that were just being requeued."""
    waiting = list(jobs)
    for _ in range(_TRIES):
        if not waiting:
            return
        slurm.cancel(waiting)
        time.sleep(1)
        waiting = [number for number, job in slurm.jobs(waiting).items() if job.last_attempt.state in WAITING]
