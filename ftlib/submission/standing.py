"""How each run of a submission stands, from its folder, its history and what Slurm says of its jobs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any

from ftlib import files
from ftlib.config import Config
from ftlib.errors import EXIT_AGAIN
from ftlib.runs import Run, process_start
from ftlib.submission.slurm import Job

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
    pairs = list(runs)
    histories = [[] if _finished(run, config) else files.read_jsonl_log(run.history) for run, config in pairs]
    submissions = [[event for event in history if event["event"] == "submitted"] for history in histories]
    ids = [event["job"] for events in submissions for event in events if event["executor"] == "slurm"]
    jobs = ask(ids) if ids else {}
    return [
        FINISHED if _finished(run, config) else _standing(history, events, jobs)
        for (run, config), history, events in zip(pairs, histories, submissions, strict=True)
    ]


def _finished(run: Run, config: Config) -> bool:
    """Trained and, as its config wants, evaluated."""
    folders = (run.evaluation(config.data.source, split, "after") for split in config.evaluation.splits)
    return run.done.exists() and all(files.is_complete(folder) for folder in folders)


def _standing(history: list[dict[str, Any]], submissions: list[dict[str, Any]], jobs: dict[str, Job]) -> str:
    known = [jobs[event["job"]] for event in submissions if event["job"] in jobs]
    if any(job.alive for job in known) or any(_lives_here(event) for event in submissions):
        return AT_WORK
    if known and known[-1].last.state == "OUT_OF_MEMORY":
        return FAILED
    if known and known[-1].last.state == "FAILED":
        return MISSING if known[-1].last.exit_code == EXIT_AGAIN else FAILED
    cancelled = known and known[-1].last.state == "CANCELLED"
    return FAILED if history and history[-1]["event"] in _OWN_FAULTS and not cancelled else MISSING


def _lives_here(event: dict[str, Any]) -> bool:
    """Whether the process of a local submission lives; that of another machine cannot be seen."""
    if event["executor"] != "local" or event["host"] != socket.gethostname():
        return False
    return process_start(int(event["job"])) is not None
