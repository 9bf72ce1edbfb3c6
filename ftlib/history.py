"""What happened to a run: history.jsonl, a line for each start and end of a command that works on it.

Written as it happens by `begin` and `endings` (and by jobs/run.sh, which alone learns that a command was killed); read
back as a list of `Attempt`, from which `ftlib status` tells what became of a run and what it cost.

| event | of | tells |
|---|---|---|
| start, evaluating | train, evaluate | job, host, GPUs, log file; of start also the recipe, if that is not 0 |
| done, evaluated | the same | seconds |
| preempted, failed | either; failed also of stage and prepare in the run's job | why |
| diverged, restart | train | why; that the same process begins anew |
| gave up | train | that it diverged more often than guard.restarts allows |
| killed | either, by jobs/run.sh | signal, or out of memory |
| lost | either, at its next start | that nobody heard its end |
| cancelled | `ftlib cancel` | by whom |
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.errors import Diverged, TaskLost, UserError
from ftlib.out_of_memory import enough_memory
from ftlib.preemption import Preempted, first_to
from ftlib.runs import Run, job_number

_BEGINNINGS = {"train": "start", "evaluate": "evaluating"}
"""Command → the event that begins an attempt of it."""

_ENDINGS = {
    "done": "done",
    "evaluated": "done",
    "preempted": "preempted",
    "gave up": "diverged",
    "failed": "failed",
    "killed": "killed",
    "lost": "lost",
}
"""Events that end an attempt → how."""

_FROM_OUTSIDE = ("submitted", "cancelled", "lost")
"""Events that are no sign of life."""


@dataclass(frozen=True)
class Attempt:
    """One start of a command.

    Attributes:
        command: train or evaluate; stage or prepare if that failed.
        began, ended: seconds since 1970; `ended` is None while it lives, and when it died unheard.
        ending: done, preempted, diverged, failed, killed or lost; "" without one.
        reason: why it ended, in words.
        gpus: allocated to it.
        job: of Slurm; "" outside.
        log: the file that its output goes to; "" when that is a terminal.
    """

    command: str
    began: float
    gpus: int
    host: str
    job: str
    log: str
    ended: float | None = None
    ending: str = ""
    reason: str = ""

    def gpu_hours(self, until: float) -> float:
        """GPUs times hours; one without an end counts until its last sign of life."""
        return self.gpus * max(0.0, (self.ended or until) - self.began) / 3600


@dataclass(frozen=True)
class Usage:
    """Starts of a run's commands, and the GPU-hours that its training and its evaluations took."""

    attempts: int
    train: float
    evaluate: float

    @property
    def hours(self) -> float:
        """GPU-hours of both."""
        return self.train + self.evaluate


def begin(run: Run, command: str, **details: Any) -> None:
    """Note that a command starts on a run."""
    run.note(_BEGINNINGS[command], command=command, gpus=count_gpus(), log=_log_file(), **details)


@contextlib.contextmanager
def endings(run: Run, command: str, seen: float) -> Iterator[None]:
    """Note how what is done inside ends, if it does not end well; first, that earlier starts died unheard.

    A failure is noted by the first process that met one, everything else by the first process of a job.

    Args:
        seen: the run's last sign of life before this process gave one.
    """
    if console.speaks():
        _close_unheard(run, command, seen)
    try:
        with enough_memory():
            yield
    except Preempted as signal:
        run.note("preempted", command=command, signal=str(signal))
        raise
    except Diverged as error:
        run.note("gave up", command=command, reason=str(error).splitlines()[0])
        raise
    except UserError as error:
        _note_failure(run, command, error.problem)
        raise
    except TaskLost as error:
        _note_failure(run, command, str(error))
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        _note_failure(run, command, f"{type(error).__name__}: {first}")
        raise


def _note_failure(run: Run, command: str, reason: str) -> None:
    """Of several ranks that fail the first one tells why, whichever that is."""
    if first_to("told"):
        run.note_from_any("failed", command=command, reason=reason)


@contextlib.contextmanager
def before_training(run: Run, command: str) -> Iterator[None]:
    """In a job that was submitted for a run, note why it does not come to its training; elsewhere, do nothing."""
    with contextlib.ExitStack() as stack:
        if job_number() and run.history.exists():
            stack.enter_context(endings(run, command, last_sign(run)))
        yield


def _close_unheard(run: Run, command: str, seen: float) -> None:
    """Of trainings there is one at a time; evaluations of other jobs may be at work, so only this job's are closed."""
    files.cut_jsonl_log(run.history)
    for one in read(run):
        if one.command == command and one.ended is None and (command == "train" or one.job == (job_number() or "")):
            run.note("lost", command=command, ended=seen, job=one.job or None)


def read(run: Run) -> list[Attempt]:
    """All attempts, oldest first."""
    return attempts_in(files.read_jsonl_log(run.history))


def attempts_in(events: list[dict[str, Any]]) -> list[Attempt]:
    """The attempts that the records of history.jsonl tell of, oldest first."""
    attempts: list[Attempt] = []
    for event in events:
        kind = event["event"]
        if kind in _BEGINNINGS.values():
            attempts.append(_begun(event, "train" if kind == "start" else "evaluate"))
        elif kind in _ENDINGS:
            _end(attempts, event)
    return attempts


def _begun(event: dict[str, Any], command: str) -> Attempt:
    return Attempt(
        command=command,
        began=event["time"],
        gpus=event.get("gpus", 0),
        host=event.get("host") or "",
        job=event.get("job") or "",
        log=event.get("log") or "",
    )


def _end(attempts: list[Attempt], event: dict[str, Any]) -> None:
    """Close the newest open attempt of the event's command and job; an end without a beginning stands for itself."""
    command = event.get("command", "evaluate" if event["event"] == "evaluated" else "train")
    job = event.get("job") or ""
    ending = _ENDINGS[event["event"]]
    reason = str(event.get("reason") or event.get("signal") or "")
    ended = event.get("ended", event["time"])
    for number in reversed(range(len(attempts))):
        one = attempts[number]
        if one.command == command and one.ended is None and one.job == job:
            attempts[number] = replace(one, ended=ended, ending=ending, reason=reason)
            return
    if ending in ("failed", "killed", "diverged"):  # it ended before it could say that it began
        attempts.append(replace(_begun(event, command), ended=ended, ending=ending, reason=reason))


def recipe_in(events: list[dict[str, Any]]) -> int:
    """The recipe that a run is or was trained with, see `identity.RECIPES`; 0 before its training begins."""
    return next((int(event.get("recipe", 0)) for event in reversed(events) if event["event"] == "start"), 0)


def jobs_of(events: list[dict[str, Any]]) -> list[str]:
    """The Slurm jobs that a run was given to, oldest first."""
    jobs = [event["job"] for event in events if event.get("job") and event.get("executor", "slurm") == "slurm"]
    return list(dict.fromkeys(jobs))


def last_sign(run: Run) -> float:
    """When a run last showed life, in seconds since 1970: a heartbeat, a step, an answer, an event of its own."""
    events = files.read_jsonl_log(run.history)
    times = [event["time"] for event in events if event["event"] not in _FROM_OUTSIDE]
    for path in (run.owner, run.metrics, *(run.folder / "eval").rglob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def usage(run: Run) -> Usage:
    """What a run has cost so far; a start that died unheard counts until the run's last sign of life."""
    attempts, last = read(run), last_sign(run)
    hours = dict.fromkeys(("train", "evaluate"), 0.0)
    for attempt in attempts:
        if attempt.command in hours:
            hours[attempt.command] += attempt.gpu_hours(last)
    return Usage(len(attempts), **hours)


def count_gpus() -> int:
    """GPUs that this job holds, by Slurm's word; outside Slurm, those that torch sees."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) * int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    torch = sys.modules.get("torch")
    return given or (torch.cuda.device_count() if torch else 0)


def _log_file() -> str | None:
    """The file that this process's messages go to: named by jobs/run.sh, or behind stderr; None for a terminal."""
    named = os.environ.get("FTLIB_LOG")
    if named:
        return named
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            return str(Path("/proc/self/fd/2").readlink())
    return None
