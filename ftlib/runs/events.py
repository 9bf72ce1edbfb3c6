"""The history of a run: history.jsonl, a line for each start and end of a command and for what happens between.

Starts and ends are written by `record_start` and `record_outcome`, and by jobs/run.sh, which alone knows when a command
was killed. They are read as a list of `CommandExecution`, from which `ftlib status` derives a run's state and cost.
Training, evaluation and submission add events of their own, such as `submitted`, `round` or `micro-batch`, with
`Run.log_event`.

| event | command | details |
|---|---|---|
| start, evaluating | train, evaluate | job, host, GPUs, log, start of the Slurm job; of start the recipe |
| training | train | the phase's steps begin: their total, rows of a step, tokens of a row on average |
| done, evaluated | the same | seconds |
| preempted, failed | both; failed also of stage and prepare in the run's job | the reason |
| diverged, restart | train | the reason; the same process restarts |
| gave up | train | it diverged more often than guard.restarts allows |
| killed | both, by jobs/run.sh | signal, or out of memory |
| lost | both, at the next start | the previous start disappeared without reporting its end |
| submitted, report submitted | `ftlib submit` | the job of the run; the job that reports on it and on others |
| cancelled | `ftlib cancel` | by whom |
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.core import jsonl
from ftlib.core import log as core_log
from ftlib.core.environment import job_id
from ftlib.core.gpu import count_gpus
from ftlib.core.out_of_memory import oom_as_user_error
from ftlib.core.signals import Preempted, claim_first
from ftlib.errors import RankLost, TrainingDiverged, UserError
from ftlib.runs.run import Run

_START_EVENTS = {"train": "start", "evaluate": "evaluating"}
"""Command → the event at its start."""

_END_EVENTS = {
    "done": "done",
    "evaluated": "done",
    "preempted": "preempted",
    "gave up": "diverged",
    "failed": "failed",
    "killed": "killed",
    "lost": "lost",
}
"""Event at the end of a command → outcome."""

_EXTERNAL_EVENTS = ("submitted", "report submitted", "cancelled", "lost")
"""Events that do not come from the run's own processes."""


@dataclass(frozen=True)
class CommandExecution:
    """One start of a command.

    Attributes:
        command: train or evaluate; stage or prepare if that failed.
        started, ended: seconds since 1970; `ended` is None while it runs, and if it died without reporting.
        outcome: done, preempted, diverged, failed, killed or lost; "" while there is none.
        reason: of its end, in words.
        gpus: number of allocated GPUs.
        job: id of the Slurm job; "" outside Slurm.
        log: the file with its output; "" for a terminal.
        allocated: when its Slurm job started on its nodes; None outside Slurm, and for runs of older versions.
        training: when its first training step began; None if it did not come that far.
        attempt, step: where training began or resumed.
    """

    command: str
    started: float
    gpus: int
    host: str
    job: str
    log: str
    ended: float | None = None
    outcome: str = ""
    reason: str = ""
    allocated: float | None = None
    training: float | None = None
    attempt: int = 0
    step: int = 0


def record_start(run: Run, command: str, **details: Any) -> None:
    """Record the start of a command."""
    known = {"gpus": count_gpus(), "log": _log_file(), **_allocated()}
    run.log_event(_START_EVENTS[command], command=command, **known, **details)


@contextlib.contextmanager
def record_outcome(run: Run, command: str, last_activity: float) -> Iterator[None]:
    """Record the outcome of the body, unless it succeeds; before it, mark earlier executions that disappeared as lost.

    A failure is recorded by the first rank that has one, everything else by the first rank of the job.

    Args:
        last_activity: the run's last activity before this process started.
    """
    if core_log.is_main_process():
        _close_orphans(run, command, last_activity)
    try:
        with oom_as_user_error():
            yield
    except Preempted as signal:
        run.log_event("preempted", command=command, signal=str(signal))
        raise
    except TrainingDiverged as error:
        run.log_event("gave up", command=command, reason=str(error).splitlines()[0])
        raise
    except UserError as error:
        _record_failure(run, command, error.problem)
        raise
    except RankLost as error:
        _record_failure(run, command, str(error))
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        _record_failure(run, command, f"{type(error).__name__}: {first}")
        raise


def _record_failure(run: Run, command: str, reason: str) -> None:
    """Record the reason, if this rank is the first one that failed."""
    if claim_first("told"):
        run.log_event_any_rank("failed", command=command, reason=reason, **_allocated())


def _allocated() -> dict[str, float]:
    """When this Slurm job started on its nodes, as jobs/run.sh reports it."""
    started = os.environ.get("FTLIB_JOB_STARTED", "")
    return {"allocated": float(started)} if started.isdigit() else {}


@contextlib.contextmanager
def record_pretraining_failure(run: Run, command: str) -> Iterator[None]:
    """In a job that was submitted for a run, record a failure before training; elsewhere do nothing."""
    with contextlib.ExitStack() as stack:
        if job_id() and run.history.exists():
            stack.enter_context(record_outcome(run, command, last_activity(run)))
        yield


def _close_orphans(run: Run, command: str, last_activity: float) -> None:
    """Mark executions without an end as lost.

    Only one training can run at a time, but evaluations may run in parallel, so only this job's evaluations are marked.
    """
    jsonl.filter_jsonl_log(run.history)
    for one in read_executions(run):
        if one.command == command and one.ended is None and (command == "train" or one.job == (job_id() or "")):
            run.log_event("lost", command=command, ended=last_activity, job=one.job or None)


def read_executions(run: Run) -> list[CommandExecution]:
    """All executions of a run, the oldest first."""
    return executions_in(jsonl.read_jsonl_log(run.history))


def executions_in(events: list[dict[str, Any]]) -> list[CommandExecution]:
    """The executions in the records of history.jsonl, the oldest first."""
    executions: list[CommandExecution] = []
    for event in events:
        kind = event["event"]
        if kind in _START_EVENTS.values():
            executions.append(_started(event, "train" if kind == "start" else "evaluate"))
        elif kind in _END_EVENTS:
            _record_end(executions, event)
        elif kind == "training":
            _record_first_step(executions, event["time"])
    return executions


def _record_first_step(executions: list[CommandExecution], time: float) -> None:
    """Record when training began its steps, in the newest training; later phases change nothing."""
    for number in reversed(range(len(executions))):
        if executions[number].command == "train":
            if executions[number].training is None:
                executions[number] = replace(executions[number], training=time)
            return


def _started(event: dict[str, Any], command: str) -> CommandExecution:
    return CommandExecution(
        command=command,
        started=event["time"],
        gpus=event.get("gpus", 0),
        host=event.get("host") or "",
        job=event.get("job") or "",
        log=event.get("log") or "",
        allocated=event.get("allocated"),
        attempt=event.get("attempt", 0),
        step=event.get("step", 0),
    )


def _record_end(executions: list[CommandExecution], event: dict[str, Any]) -> None:
    """End the newest open execution of the event's command and job; without one, add an execution that has ended."""
    command = event.get("command", "evaluate" if event["event"] == "evaluated" else "train")
    job = event.get("job") or ""
    ending = _END_EVENTS[event["event"]]
    reason = str(event.get("reason") or event.get("signal") or "")
    ended = event.get("ended", event["time"])
    for number in reversed(range(len(executions))):
        one = executions[number]
        if one.command == command and one.ended is None and one.job == job:
            executions[number] = replace(one, ended=ended, outcome=ending, reason=reason)
            return
    if ending in ("failed", "killed", "diverged"):  # it ended before it recorded its start
        executions.append(replace(_started(event, command), ended=ended, outcome=ending, reason=reason))


def recipe_of(events: list[dict[str, Any]]) -> int:
    """The recipe that a run is or was trained with, see `identity.RECIPES`; 0 before its training begins."""
    return next((int(event.get("recipe", 0)) for event in reversed(events) if event["event"] == "start"), 0)


def slurm_jobs_of(events: list[dict[str, Any]]) -> list[str]:
    """The Slurm jobs of a run, submitted by ftlib or by hand, the oldest first."""
    jobs = [event["job"] for event in events if event.get("job") and event.get("executor", "slurm") == "slurm"]
    return list(dict.fromkeys(jobs))


def last_activity(run: Run) -> float:
    """Time of a run's last heartbeat, step, prediction or event of its own, in seconds since 1970."""
    events = jsonl.read_jsonl_log(run.history)
    times = [event["time"] for event in events if event["event"] not in _EXTERNAL_EVENTS]
    for path in (run.owner, run.metrics, *(run.folder / "eval").rglob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _log_file() -> str | None:
    """The log file of this process: named by jobs/run.sh, or the file behind stderr; None for a terminal."""
    named = os.environ.get("FTLIB_LOG")
    if named:
        return named
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            return str(Path("/proc/self/fd/2").readlink())
    return None
