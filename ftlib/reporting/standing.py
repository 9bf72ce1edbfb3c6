"""How runs stand, from the files in their folders and, where Slurm answers, from what it says of their jobs.

Nothing is written but a probe beside the runs that tells the storage's own time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import console, files, history
from ftlib.history import Attempt
from ftlib.ownership import living_owner, storage_time
from ftlib.runs import Run, handle, host_name, process_start
from ftlib.site import Site
from ftlib.submission import slurm
from ftlib.submission.slurm import Job, Slurm, Unreachable

_TAIL_BYTES = 1 << 13
_RECENT_STEPS = 20
_EVALUATION_PULSE = 600
"""An evaluation that wrote no answer for so many seconds is taken for dead where Slurm cannot be asked."""

_SIGNALS = {"SIGUSR1": "time limit", "SIGTERM": "preempted"}
_SLURM_WORDS = {
    "TIMEOUT": "time limit",
    "DEADLINE": "deadline",
    "OUT_OF_MEMORY": "out of memory; ask for more: job.mem",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "PREEMPTED": "preempted, and Slurm did not requeue it",
}
"""Slurm's name of a job's end → plain words."""

_AGAIN = ("preempted", "killed", "lost")
"""Endings after which the same job may begin again."""

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Standing:
    """One run's line in the table.

    Attributes:
        run: how commands name it.
        state: done, running, evaluating, queued, cancelled, failed, diverged, stopped, died or not started.
        reason: in plain words; "" when there is nothing to say.
        step, total: of training; total is None before it is known.
        seconds_per_step: median of the last steps.
        eta: seconds until the last step, while it runs.
        node, job: of the newest attempt.
        recipe: that it is trained with, see `identity.RECIPES`.
    """

    run: str
    state: str
    reason: str
    step: int
    total: int | None
    seconds_per_step: float | None
    eta: float | None
    loss: float | None
    node: str
    job: str
    recipe: int = 0


def own_jobs(events: Events) -> list[str]:
    """Those of its jobs that may be ended with a run: submitted for it, or begun by hand and not over for it.

    An allocation, or a job that trains one config after the other, has gone on to something else once a run has ended.
    """
    attempts = history.attempts_in(events)
    submitted = _submitted(events)
    return [number for number in history.jobs_of(events) if number in submitted or _may_go_on(attempts, number)]


def open_jobs(run: Run) -> list[str]:
    """The jobs that Slurm has to be asked about to know how a run stands: none if all of them have ended well."""
    events = files.read_jsonl_log(run.history)
    finished = run.done.exists() and events and events[-1]["event"] in ("done", "evaluated")
    return [] if finished and not _unbegun(events, history.attempts_in(events)) else history.jobs_of(events)


def _submitted(events: Events) -> list[str]:
    return history.jobs_of([event for event in events if event["event"] == "submitted"])


def _unbegun(events: Events, attempts: Sequence[Attempt]) -> list[str]:
    """Submitted jobs of which no command has been heard."""
    begun = {one.job for one in attempts}
    return [number for number in _submitted(events) if number not in begun]


def _may_go_on(attempts: Sequence[Attempt], number: str) -> bool:
    """Whether a job that is not over may be at work on the run, or come to it."""
    own = [one for one in attempts if one.job == number]
    return not own or own[-1].ending in _AGAIN or any(one.ended is None for one in own)


def standings_of(chosen: Sequence[Run], site: Site) -> list[Standing]:
    """How runs stand, in their order; if Slurm does not answer, by what the run folders know, and the user is told."""
    now = storage_time(site.runs)
    try:
        jobs = Slurm().jobs([job for run in chosen for job in open_jobs(run)])
    except Unreachable as error:
        console.say(f"Slurm cannot be asked ({error}); this is what the run folders know")
        jobs = {}
    return [stand(run, site, now, jobs) for run in chosen]


def stand(run: Run, site: Site, now: float, jobs: Mapping[str, Job]) -> Standing:
    """How a run stands.

    Args:
        now: by the storage's clock.
        jobs: what Slurm says of the runs' jobs; those that it does not know any more are left out.
    """
    events = files.read_jsonl_log(run.history)
    attempts = history.attempts_in(events)
    number, job = _newest_job(events, attempts, jobs)
    state, reason = _state(run, events, now, number, job)
    steps = _last_records(run.metrics)
    step = steps[-1]["step"] if steps else 0
    paces = [record["seconds"] for record in steps if "seconds" in record and "split" not in record]
    pace = statistics.median(paces[-_RECENT_STEPS:]) if paces else None
    total = _total(run, events)
    left = pace * (total - step) if pace is not None and total is not None and state == "running" else None
    return Standing(
        run=handle(run, site),
        state=state,
        reason=reason,
        step=step,
        total=total,
        seconds_per_step=pace,
        eta=left,
        loss=next((record["loss"] for record in reversed(steps) if "loss" in record), None),
        node=attempts[-1].host if attempts else "",
        job=number,
        recipe=history.recipe_in(events),
    )


def _newest_job(
    events: Events, attempts: Sequence[Attempt], jobs: Mapping[str, Job]
) -> tuple[str, slurm.Attempt | None]:
    """The job that matters: one at work on the run, else the first that waits, else the last that did not fall."""
    numbers = history.jobs_of(events)
    known = {number: jobs[number].last for number in numbers if number in jobs}
    for states in (slurm.RUNNING, slurm.WAITING):
        for number, job in known.items():
            if job.state in states and (states is slurm.WAITING or _may_go_on(attempts, number)):
                return number, job
    own = [number for number in numbers if number not in known or not _fell(known[number])]
    last = (own or numbers or [""])[-1]
    return last, known.get(last)


def _fell(job: slurm.Attempt) -> bool:
    """Whether Slurm cancelled a job that had not begun, since the one that it waited for had failed."""
    return job.state == "CANCELLED" and not job.node and not job.by


def _state(run: Run, events: Events, now: float, number: str, job: slurm.Attempt | None) -> tuple[str, str]:
    attempts = history.attempts_in(events)
    evaluation = attempts[-1] if attempts and attempts[-1].command == "evaluate" else None
    if living_owner(run.folder, now):
        return "running", _interruptions(events, attempts)
    running = job is not None and job.state in slurm.RUNNING
    if evaluation and evaluation.ended is None:
        known = job is not None and number == evaluation.job  # what is begun elsewhere by hand shows its pulse only
        if running if known else now - history.last_sign(run) < _EVALUATION_PULSE:
            return "evaluating", ""
    if job and job.state in slurm.WAITING:
        why = f"waits for {job.reason}" if job.reason else ""
        return "queued", "; ".join(filter(None, [_interruptions(events, attempts), why]))
    cancelled = _cancelled(events, job)
    starting = running and not cancelled and _may_go_on(attempts, number)
    if run.done.exists():
        unbegun = [] if evaluation else _unbegun(events, attempts)
        own = job if number in unbegun else None
        said = _before_evaluation(own, cancelled) if unbegun else _after_training(evaluation, cancelled)
        return ("evaluating", "starting") if starting else ("done", said)
    if cancelled:
        return "cancelled", cancelled
    if starting:
        return "running", "starting"
    return ("queued", "waits for its turn") if waits_here(events) else _ended(events, attempts, job)


def waits_here(events: Events) -> bool:
    """Whether a process of this machine, that several runs share, will come to this run."""
    last = events[-1] if events else {}
    if last.get("executor") != "local" or last["host"] != host_name():
        return False
    started = process_start(int(last["job"]))
    return started is not None and started == last.get("started")  # else another process has its number


def _before_evaluation(job: slurm.Attempt | None, cancelled: str) -> str:
    """What is to be said of a trained run whose evaluation was submitted, as a job of its own, and never began."""
    if cancelled:
        return f"evaluation cancelled {cancelled}"
    if job is None:
        return "evaluation not begun"
    return f"evaluation failed: {_SLURM_WORDS.get(job.state, 'its job ended before it began')}"


def _after_training(evaluation: Attempt | None, cancelled: str) -> str:
    """What is to be said of a trained run: whether its evaluation came to an end."""
    if evaluation is None or evaluation.ending == "done":
        return ""
    if evaluation.ending in ("failed", "killed"):
        return f"evaluation failed: {evaluation.reason}"
    return f"evaluation cancelled {cancelled}" if cancelled else "evaluation not finished"


def _ended(events: Events, attempts: Sequence[Attempt], job: slurm.Attempt | None) -> tuple[str, str]:
    """Of a run that neither lives nor waits nor is done."""
    said = _SLURM_WORDS.get(job.state, "") if job else ""
    if not attempts:
        return ("failed", said or "its job ended before training began") if job else ("not started", "")
    unfinished = [one for one in attempts if (one.command, one.ending) != ("evaluate", "done")]
    if not unfinished:
        return "not started", "only its untrained model was evaluated"
    last = unfinished[-1]
    if last.ending == "diverged":
        reasons = [event["reason"] for event in events if event["event"] == "diverged"]
        return "diverged", f"in every attempt ({len(reasons)}), at last: {reasons[-1]}"
    if last.ending == "failed":
        return "failed", last.reason
    if last.ending == "killed":
        return "failed", said or f"killed: {last.reason}"
    if last.ending == "preempted":
        return "stopped", f"{_SIGNALS.get(last.reason, last.reason)}; saved: run or submit it again and it goes on"
    return "died", said or "ended without a word; run or submit it again and it goes on"


def _cancelled(events: Events, job: slurm.Attempt | None) -> str:
    """By whom, if the newest thing that happened is a cancellation."""
    if job and job.state.startswith("CANCELLED"):
        return "by scancel" if job.by else "in Slurm"
    by = ""
    for event in events:
        if event["event"] == "cancelled":
            by = f"by {event['by']}"
        elif event["event"] in ("start", "evaluating", "submitted"):
            by = ""
    return by


def _interruptions(events: Events, attempts: Sequence[Attempt]) -> str:
    """How often a signal, a death or a divergence interrupted training so far."""
    words = [_SIGNALS.get(one.reason, one.reason) for one in attempts if one.ending == "preempted"]
    words += ["killed" for one in attempts if one.ending in ("killed", "lost")]
    words += ["diverged" for event in events if event["event"] == "diverged"]
    return ", ".join(f"{word} {words.count(word)} times".replace(" 1 times", " once") for word in dict.fromkeys(words))


def _last_records(path: Path) -> list[dict[str, Any]]:
    """The last records of a log that may be long."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        if size > _TAIL_BYTES:
            file.readline()
        return files.jsonl_records(file.read())


def _total(run: Run, events: Events) -> int | None:
    """How many steps training has in all."""
    if run.done.exists():
        return int(files.read_json(run.done)["step"])
    totals = [event["total"] for event in events if event["event"] == "training"]
    return totals[-1] if totals else None
