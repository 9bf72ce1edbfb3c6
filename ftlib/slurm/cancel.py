"""Cancel runs: what waits is dropped, what runs saves and ends. They stay cancelled until they are submitted again."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import time
from collections.abc import Mapping, Sequence

from ftlib.core import environment, jsonl, log
from ftlib.core.lease import current_holder, storage_time
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.slurm import intents, status
from ftlib.slurm.client import WAITING, Slurm, SlurmUnavailable

_TRIES = 5


def cancel_runs(chosen: Sequence[Run], site: Site) -> list[Run]:
    """Cancel runs, in Slurm and on this machine; and the job that reports on them, unless other runs still need it.

    A run is recorded as cancelled when scancel has answered.

    Returns:
        Those that were queued or running.

    Raises:
        UserError: Slurm does not answer.
    """
    slurm = Slurm()
    try:
        intents.settle_interrupted(site, slurm)
        events = {run: jsonl.read_jsonl_log(run.history) for run in chosen}
        reports = _reports(events)
        others = {run: each for siblings in reports.values() for run, each in siblings.items()}
        numbers = {run: status.own_jobs(each) for run, each in {**others, **events}.items()}
        known = slurm.jobs([*(number for each in numbers.values() for number in each), *reports], own=True)
        active = {number for number, job in known.items() if job.is_active}
        alive = {run: [number for number in each if number in active] for run, each in numbers.items()}
        needless = [job for job, siblings in reports.items() if job in active and not any(map(alive.get, siblings))]
        _scancel(slurm, [*(number for run in chosen for number in alive[run]), *needless])
    except SlurmUnavailable as error:
        raise UserError(f"Slurm cannot cancel: {error}", error.remedy) from None
    for job in needless:
        log.info(f"cancelled job {job}, which would report on these runs")
    return [run for run in chosen if _cancel(run, alive[run], status.waits_locally(events[run]), site)]


def _reports(events: Mapping[Run, status.Events]) -> dict[str, dict[Run, status.Events]]:
    """Return the jobs that report on runs, each with the other runs that it reports on and their events."""
    found: dict[str, dict[Run, status.Events]] = {}
    for run, each in events.items():
        for job in (event["report"] for event in each if event["event"] == "report submitted"):
            found.setdefault(job, {})
            for path in run.folder.parent.glob("*/history.jsonl"):
                other = Run(path.parent)
                if other not in events and other not in found[job]:
                    its = jsonl.read_jsonl_log(path)
                    if any(event.get("report") == job for event in its):
                        found[job][other] = its
    return found


def _cancel(run: Run, jobs: Sequence[str], waits: bool, site: Site) -> bool:
    """Record the cancellation for `status` and for local workers, and end a process of this machine."""
    name = runs.run_name(run, site)
    owner = current_holder(run.folder, storage_time(run.folder))
    here = owner is not None and owner["job"] is None and owner["host"] == environment.host_name()
    if not jobs and not here and not waits:
        if owner and owner["job"] is None:
            log.warning(f"{name}: running as process {owner['pid']} on {owner['host']}; cancel it there")
        return False
    run.log_event("cancelled", by=getpass.getuser(), job=None)
    if owner and here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner["pid"], signal.SIGTERM)
    what = ", ".join(f"job {job}" for job in jobs) or (f"process {owner['pid']}" if owner else "before its turn")
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
