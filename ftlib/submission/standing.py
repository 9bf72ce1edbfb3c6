"""How each run of a submission stands, from its folder, its owner, its history and what Slurm says of its jobs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any

from ftlib import files
from ftlib.config import Config
from ftlib.errors import EXIT_AGAIN
from ftlib.history import attempts_in, jobs_of
from ftlib.ownership import living_owner, storage_time
from ftlib.runs import Run, process_start
from ftlib.submission.slurm import Attempt, Job

Events = list[dict[str, Any]]

FINISHED = "finished"
AT_WORK = "queued or running"
FAILED = "failed"
MISSING = "missing"
"""No result, and nothing is making one: never begun, or cancelled, preempted or lost on the way."""

_OWN_FAULTS = ("gave up", "failed", "killed")
"""Last events of a history after which running the same again hardly helps."""


def standings(runs: Iterable[tuple[Run, Config]], ask: Callable[[list[str]], dict[str, Job]]) -> list[str]:
    """How runs stand, in their order.

    Args:
        ask: gives the jobs that Slurm knows of, for job ids; called once, and not at all without ids.

    Raises:
        Unreachable: from `ask`.
    """
    pairs = [(run, _finished(run, config)) for run, config in runs]
    histories = [[] if finished else files.read_jsonl_log(run.history) for run, finished in pairs]
    ids = [job for events in histories for job in _slurm_jobs(events)]
    jobs = ask(ids) if ids else {}
    return [
        FINISHED if finished else _standing(run, events, jobs)
        for (run, finished), events in zip(pairs, histories, strict=True)
    ]


def _finished(run: Run, config: Config) -> bool:
    """Trained and, as its config wants, evaluated."""
    folders = (run.evaluation(config.data.source, split, "after") for split in config.evaluation.splits)
    return run.done.exists() and all(files.is_complete(folder) for folder in folders)


def _standing(run: Run, events: Events, jobs: dict[str, Job]) -> str:
    submissions = [event for event in events if event["event"] == "submitted"]
    if any(jobs[job].alive for job in _slurm_jobs(events) if job in jobs):
        return AT_WORK
    turns = [event for event in events if event["event"] in ("submitted", "cancelled")]
    if any(_lives_here(event) for event in turns[-1:]) or _is_owned(run):
        return AT_WORK
    end = _end(submissions, jobs)
    if end and end.state == "OUT_OF_MEMORY":
        return FAILED
    if end and end.state == "FAILED":
        return MISSING if end.exit_code == EXIT_AGAIN else FAILED
    cancelled = end and end.state == "CANCELLED"
    return FAILED if events and events[-1]["event"] in _OWN_FAULTS and not cancelled else MISSING


def _slurm_jobs(events: Events) -> list[str]:
    """The jobs that a run was submitted to, and those that it began in without (sbatch jobs/train.sbatch).

    Of the latter, one in which it failed is left out: what lives on may be at work on another run, or a user's shell.
    """
    endings = {attempt.job: attempt.ending for attempt in attempts_in(events)}
    left = {job for job, ending in endings.items() if ending in ("failed", "diverged")}
    left -= {event["job"] for event in events if event["event"] == "submitted"}
    return [job for job in jobs_of(events) if job not in left]


def _is_owned(run: Run) -> bool:
    """Whether a process is at work on a run, on whatever machine."""
    return run.owner.exists() and living_owner(run.folder, storage_time(run.folder)) is not None


def _end(submissions: Events, jobs: dict[str, Job]) -> Attempt | None:
    """How the last submission ended: in the first of its jobs that did not complete; later ones waited for it."""
    chain: Events = []
    for event in reversed(submissions):
        chain.insert(0, event)
        if not event.get("after"):
            break
    ends = [jobs[event["job"]].last for event in chain if event["job"] in jobs]
    return next((end for end in ends if end.state != "COMPLETED"), ends[-1] if ends else None)


def _lives_here(event: dict[str, Any]) -> bool:
    """Whether the process of a local submission lives, and not another with its number; elsewhere it cannot be seen."""
    if event.get("executor") != "local" or event["host"] != socket.gethostname():
        return False
    started = process_start(int(event["job"]))
    return started is not None and started == event.get("started")
