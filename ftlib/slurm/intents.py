"""Submissions are written down before sbatch is called, so that a job whose ID never arrived is found again.

`<runs>/.submissions/<nonce>.json` exists from before the call of sbatch until the history of every run has the job's
ID. sbatch's answer may be lost (a time-out, a killed `ftlib submit`, a full disk) although Slurm has the job. Its name
is unique and is looked up in squeue and sacct before anything is sent again. A lease on the folder lets one `submit`
or `cancel` of a user at a time decide what is sent; the file of a submission in progress is never settled by others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.core import files, jsonl, log, permissions
from ftlib.core.lease import LeaseHeld, acquire_lease
from ftlib.core.paths import Site
from ftlib.runs.run import Run
from ftlib.slurm.client import Slurm

_FOLDER = ".submissions"
_POLL_SECONDS = 1.0
SECONDS_BETWEEN_LOOKUPS = 5.0
"""A job that sbatch has just sent may not be in squeue's first answer."""


@dataclass(frozen=True)
class Intent:
    """A call of sbatch whose job ID is not in the history of its runs yet.

    Attributes:
        file: where it is stored.
        name: the job's name, which no other job has.
        time: of writing, in seconds since 1970.
        output: folder of the job's output and of submitit's files.
        runs: folders of the runs, in the order of the array's elements; of a report, the runs that it shows.
        after: for each run the job that its job waits for, or None.
        report: whether it is the job that reports on all runs.
    """

    file: Path
    name: str
    time: float
    output: Path
    runs: Sequence[Path]
    after: Sequence[str | None]
    report: bool = False

    def job_ids(self, job: str) -> list[str]:
        """Return the job IDs of the runs: those of an array's elements, or the job itself."""
        return [job] if self.report or len(self.runs) == 1 else [f"{job}_{index}" for index in range(len(self.runs))]

    def pickle(self, index: int) -> Path:
        """Where the command of an element is stored until its job ID is known."""
        return self.output / f"{self.name}_{index}.pkl"

    @property
    def script(self) -> Path:
        """Where the batch script is stored until the job ID is known."""
        return self.output / f"{self.name}.sh"

    def events(self, job: str) -> list[dict[str, Any]]:
        """Return for each run what is added to its history when the job's ID is known."""
        if self.report:
            return [{"event": "report submitted", "report": job, "job": None} for _ in self.runs]
        return [
            {
                "event": "submitted",
                "job": number,
                "executor": "slurm",
                "log": str(self.output / f"{number}_0_log.out"),
                "after": after,
                "started": None,
            }
            for number, after in zip(self.job_ids(job), self.after, strict=True)
        ]


def new_intent(
    site: Site, job_name: str, output: Path, runs: Sequence[Run], after: Sequence[str | None], report: bool
) -> Intent:
    """Return an intent with a unique name: the job's, the ID of the (first) run, and a nonce. Nothing is written."""
    nonce = uuid.uuid4().hex[:8]
    name = f"{job_name}-{runs[0].folder.name[:6]}-{nonce}"
    folders = [run.folder for run in runs]
    return Intent(site.runs / _FOLDER / f"{nonce}.json", name, time.time(), output, folders, after, report)


def write_intent(intent: Intent) -> None:
    """Store an intent; it is on disk when this returns.

    Raises:
        UserError: no space, or not writable; nothing may be sent then.
    """
    stored = {**dataclasses.asdict(intent), "output": str(intent.output), "runs": [str(each) for each in intent.runs]}
    del stored["file"]
    files.write_json(intent.file, stored)


def confirm(intent: Intent, job: str) -> None:
    """Record a job in the histories of its runs and hand it its commands; can be repeated after an interruption.

    Raises:
        UserError: no space; the intent stays.
    """
    with files.storage_errors(intent.output):
        for index, number in enumerate(intent.job_ids(job)):
            with contextlib.suppress(FileNotFoundError):  # moved before an interruption
                intent.pickle(index).rename(intent.output / f"{number}_submitted.pkl")
        with contextlib.suppress(FileNotFoundError):
            intent.script.rename(intent.output / f"{job}_submission.sh")
    for folder, event in zip(intent.runs, intent.events(job), strict=True):
        run = Run(folder)
        if folder.is_dir() and not any(event.items() <= known.items() for known in jsonl.read_jsonl_log(run.history)):
            run.log_event(**event)
    intent.file.unlink(missing_ok=True)


def withdraw(intent: Intent) -> None:
    """Delete an intent whose job Slurm does not have."""
    for index in range(len(intent.job_ids("0"))):
        intent.pickle(index).unlink(missing_ok=True)
    intent.script.unlink(missing_ok=True)
    intent.file.unlink(missing_ok=True)


def unsettled(site: Site) -> list[Intent]:
    """Return the stored intents, the oldest first; none of another user's runs folder that cannot be read."""
    found = []
    with contextlib.suppress(PermissionError):
        for file in (site.runs / _FOLDER).glob("*.json"):
            if file.name == "owner.json":  # the lease
                continue
            with contextlib.suppress(FileNotFoundError):  # settled meanwhile
                stored = files.read_json(file)
                folders = [Path(each) for each in stored.pop("runs")]
                found.append(Intent(file=file, output=Path(stored.pop("output")), runs=folders, **stored))
    return sorted(found, key=lambda intent: intent.time)


def look_up(intents: Sequence[Intent], slurm: Slurm) -> dict[str, str]:
    """Return the jobs of intents that Slurm has: name → job ID. It is asked twice for what it does not know at first.

    Raises:
        SlurmUnavailable: it does not respond.
    """
    names = [intent.name for intent in intents]
    since = min((intent.time for intent in intents), default=0.0)
    found = slurm.find_by_name(names, since) if names else {}
    if missing := [name for name in names if name not in found]:
        time.sleep(SECONDS_BETWEEN_LOOKUPS)
        found |= slurm.find_by_name(missing, since)
    return found


def settle(site: Site, slurm: Slurm) -> None:
    """Find out what became of interrupted submissions: record the jobs that Slurm has, drop the others.

    Raises:
        SlurmUnavailable: it does not respond; the intents stay.
        UserError: no space.
    """
    if not (open_intents := unsettled(site)):
        return
    found = look_up(open_intents, slurm)
    for intent in open_intents:
        if job := found.get(intent.name):
            log.warning(f"{intent.name}: its submission was interrupted, but Slurm has it: job {job}")
            confirm(intent, job)
        else:
            log.warning(f"{intent.name}: its submission was interrupted, and Slurm has no such job")
            withdraw(intent)


@contextlib.contextmanager
def exclusive(site: Site) -> Iterator[None]:
    """Context in which no other `submit` or `cancel` of this user sends or cancels jobs; waits for its turn."""
    permissions.open_runs(site)
    folder = site.runs / _FOLDER
    with files.storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    told = False
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(acquire_lease(folder))
                break
            except LeaseHeld as error:
                if not told:
                    log.info(f"another ftlib submit or cancel is at work ({error.problem}); waiting")
                told = True
                time.sleep(_POLL_SECONDS)
        yield


def settle_interrupted(site: Site, slurm: Slurm) -> None:
    """Do `settle` when no other `submit` or `cancel` is at work.

    Raises:
        SlurmUnavailable: it does not respond; the intents stay.
    """
    if unsettled(site):
        with exclusive(site):
            settle(site, slurm)


def found_events(site: Site, slurm: Slurm) -> dict[Run, list[dict[str, Any]]]:
    """Return what `settle` would add to the histories of runs. Nothing is written.

    Raises:
        SlurmUnavailable: it does not respond.
    """
    added: dict[Run, list[dict[str, Any]]] = {}
    if open_intents := unsettled(site):
        found = slurm.find_by_name([intent.name for intent in open_intents], open_intents[0].time)
        for intent in open_intents:
            if job := found.get(intent.name):
                for folder, event in zip(intent.runs, intent.events(job), strict=True):
                    added.setdefault(Run(folder), []).append({"time": intent.time, **event})
    return added
