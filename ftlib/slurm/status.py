"""The status of runs, from the files in their folders and, if Slurm responds, from the state of their jobs.

Nothing is written except a probe file beside the runs, which shows the storage's clock.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.schema import Config
from ftlib.core import files, jsonl, log
from ftlib.core.environment import host_name, process_start
from ftlib.core.lease import current_holder, storage_time
from ftlib.core.paths import Site
from ftlib.errors import EXIT_REQUEUE
from ftlib.runs import events as runs_events
from ftlib.runs.events import CommandExecution
from ftlib.runs.log_files import last_error
from ftlib.runs.run import Run, run_name
from ftlib.runs.usage import usage
from ftlib.slurm import client, intents
from ftlib.slurm.client import Job, Slurm, SlurmUnavailable
from ftlib.slurm.pending import pending_remedy

_TAIL_BYTES = 1 << 13
_RECENT_STEPS = 20
_EVALUATION_HEARTBEAT_SECONDS = 600
"""Without Slurm, an evaluation without new predictions for this many seconds counts as dead."""

_SIGNALS = {"SIGUSR1": "time limit", "SIGTERM": "preempted"}
_SLURM_REASONS = {
    "TIMEOUT": "time limit",
    "DEADLINE": "deadline",
    "OUT_OF_MEMORY": "out of memory; request more with job.mem, or sbatch --mem=…",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "PREEMPTED": "preempted, and Slurm did not requeue it",
}
"""Slurm's final state of a job → reason in plain words."""

EVALUATION_FAILED = "evaluation failed"
_NOTHING_SAVED = ", before anything was saved; run or submit it again"
NEVER_BEGUN = "never begun"
"""State of a run whose newest job ended before training started."""

_ENDS_FOR_GOOD = ("failed", "gave up", "killed")
"""Events after which a process continues with its next run."""

_RESUMABLE = ("preempted", "killed", "lost")
"""Events after which the same job may start again."""

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        run: the run's name in commands.
        state: done, running, evaluating, queued, cancelled, failed, diverged, stopped, died, never begun or not
            started.
        reason: in plain words; may be "".
        step, total: training steps; total is None while unknown.
        seconds_per_step: median of the last steps.
        eta: estimated seconds until the last step, while it runs.
        node, job: of the newest attempt.
        recipe: the run's recipe, see `identity.RECIPES`.
        rows_per_second, tokens_per_second: of all GPUs together; None while unknown, and for runs of older versions.
        goodput: share of the allocated time that was training, from the history alone; see `runs/usage.py`.
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
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    goodput: float | None = None


def own_jobs(events: Events) -> list[str]:
    """Return the jobs that can be cancelled with a run: submitted for it, or started by hand and still working on it.

    An interactive allocation, or a job that trains several configs, may work on something else after a run has ended.
    """
    executions = runs_events.executions_in(events)
    submitted = _submitted(events)
    return [
        number for number in runs_events.slurm_jobs_of(events) if number in submitted or _may_resume(executions, number)
    ]


def open_jobs(run: Run, added: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Return the jobs whose state in Slurm determines the run's status; empty if all of them have succeeded.

    Args:
        added: events that the history does not have yet, see `intents.found_events`.
    """
    events = [*jsonl.read_jsonl_log(run.history), *added]
    finished = run.done_marker.exists() and events and _own_events(events)[-1]["event"] in ("done", "evaluated")
    return (
        []
        if finished and not _unstarted_jobs(events, runs_events.executions_in(events))
        else runs_events.slurm_jobs_of(events)
    )


def _own_events(events: Events) -> Events:
    """Return the events of the run's own jobs; at least one, if there are any."""
    return [event for event in events if event["event"] != "report submitted"] or events


def _submitted(events: Events) -> list[str]:
    return runs_events.slurm_jobs_of([event for event in events if event["event"] == "submitted"])


def _unstarted_jobs(events: Events, executions: Sequence[CommandExecution]) -> list[str]:
    """Return submitted jobs that have not started a command."""
    begun = {one.job for one in executions}
    return [number for number in _submitted(events) if number not in begun]


def _may_resume(executions: Sequence[CommandExecution], number: str) -> bool:
    """Whether an active job may work on the run now or later."""
    own = [one for one in executions if one.job == number]
    return not own or own[-1].outcome in _RESUMABLE or any(one.ended is None for one in own)


def run_statuses(chosen: Sequence[Run], site: Site) -> list[RunStatus]:
    """Return the status of runs, in order; if Slurm does not respond, from the run folders alone, with a message."""
    now, slurm = storage_time(site.runs), Slurm()
    jobs: dict[str, Job] | None = None
    added: dict[Run, Events] = {}
    try:
        added = intents.found_events(site, slurm)
        jobs = slurm.jobs([job for run in chosen for job in open_jobs(run, added.get(run, ()))])
    except SlurmUnavailable as error:
        log.warning(f"Slurm is not available ({error}); showing the state in the run folders")
    return [run_status(run, site, now, jobs, added.get(run, ())) for run in chosen]


def run_status(
    run: Run, site: Site, now: float, jobs: Mapping[str, Job] | None, added: Sequence[dict[str, Any]] = ()
) -> RunStatus:
    """Return the status of a run.

    Args:
        now: by the storage's clock.
        jobs: the runs' jobs in Slurm; jobs that it no longer knows are missing. None if Slurm does not respond.
        added: events that the history does not have yet, see `intents.found_events`.
    """
    events = [*jsonl.read_jsonl_log(run.history), *added]
    executions = runs_events.executions_in(events)
    number, job = _newest_job(events, executions, jobs or {})
    state, reason = _state(run, events, now, number, job, jobs)
    steps = _last_records(run.metrics)
    step = steps[-1]["step"] if steps else 0
    paces = [record["seconds"] for record in steps if "seconds" in record and "split" not in record]
    pace = statistics.median(paces[-_RECENT_STEPS:]) if paces else None
    total = _total(run, events)
    rows, tokens = _speed(events, pace)
    spent = usage(run).time
    left = pace * (total - step) if pace is not None and total is not None and state == "running" else None
    return RunStatus(
        run=run_name(run, site),
        state=state,
        reason=reason,
        step=step,
        total=total,
        seconds_per_step=pace,
        eta=left,
        loss=next((record["loss"] for record in reversed(steps) if "loss" in record), None),
        node=executions[-1].host if executions else "",
        job=number,
        recipe=runs_events.recipe_of(events),
        rows_per_second=rows,
        tokens_per_second=rows * tokens if rows and tokens else None,
        goodput=spent.goodput if spent.training else None,
    )


def _newest_job(
    events: Events, executions: Sequence[CommandExecution], jobs: Mapping[str, Job]
) -> tuple[str, client.JobAttempt | None]:
    """Return the relevant job: one that works on the run, else the first pending, else the last whose dependency
    held."""
    numbers = runs_events.slurm_jobs_of(events)
    known = {number: jobs[number].last_attempt for number in numbers if number in jobs}
    for states in (client.RUNNING, client.WAITING):
        for number, job in known.items():
            if job.state in states and (states is client.WAITING or _may_resume(executions, number)):
                return number, job
    own = [number for number in numbers if number not in known or not _dependency_failed(known[number])]
    last = (own or numbers or [""])[-1]
    return last, known.get(last)


def _dependency_failed(job: client.JobAttempt) -> bool:
    """Whether Slurm cancelled a job before its start because its dependency failed."""
    return job.state == "CANCELLED" and not job.node and (not job.by or job.reason.startswith("Dependency"))


def _state(
    run: Run,
    events: Events,
    now: float,
    number: str,
    job: client.JobAttempt | None,
    jobs: Mapping[str, Job] | None,
) -> tuple[str, str]:
    executions = runs_events.executions_in(events)
    evaluation = executions[-1] if executions and executions[-1].command == "evaluate" else None
    if _is_held(run, events, now, jobs or {}):
        return "running", _interruptions(events, executions)
    running = job is not None and job.state in client.RUNNING
    if evaluation and evaluation.ended is None:
        known = (
            job is not None and number == evaluation.job
        )  # evaluations started by hand elsewhere only show their predictions
        if running if known else now - runs_events.last_activity(run) < _EVALUATION_HEARTBEAT_SECONDS:
            return "evaluating", ""
    if job and job.state in client.WAITING:
        remedy = pending_remedy(job.reason)
        why = f"waits for {job.reason}{f': {remedy}' if remedy else ''}" if job.reason else ""
        return "queued", "; ".join(filter(None, [_interruptions(events, executions), why]))
    cancelled = _cancelled(events, job)
    starting = running and not cancelled and _may_resume(executions, number)
    if run.done_marker.exists():
        unbegun = [] if evaluation else _unstarted_jobs(events, executions)
        own = job if number in unbegun else None
        said = _before_evaluation(own, cancelled) if unbegun else _after_training(evaluation, cancelled)
        return ("evaluating", "starting") if starting else ("done", said)
    if cancelled:
        return "cancelled", cancelled
    if starting:
        return "running", "starting"
    if waits_locally(events):
        return "queued", "waits for its turn"
    since = _newest_submission(events)
    if since and not any(event["event"] in ("start", "evaluating") for event in since):
        failures = [str(event.get("reason", "")) for event in since if event["event"] in ("failed", "killed")]
        if jobs is None and not failures and since[0].get("executor") == "slurm":
            return "not started", f"submitted as job {number}; Slurm does not answer"
        return NEVER_BEGUN, failures[-1] if failures else _why_never_begun(run, since, job)
    return _ended_state(run, events, executions, job)


def _is_held(run: Run, events: Events, now: float, jobs: Mapping[str, Job]) -> bool:
    """Whether a process works on the run. The heartbeat of one that was killed on another node stays fresh for a
    minute, but its job has ended then, or jobs/run.sh has recorded its death.
    """
    owner = current_holder(run.folder, now)
    if owner is None:
        return False
    job = owner["job"]
    if job is not None and job in jobs and jobs[job].last_attempt.state not in client.RUNNING:
        return False
    killed = [event["time"] for event in events if event["event"] == "killed" and event.get("job") == job is not None]
    with contextlib.suppress(FileNotFoundError):
        return not killed or run.owner.stat().st_mtime > killed[-1]
    return False


def _newest_submission(events: Events) -> Events:
    """Return the events since the newest submission, which may be of several jobs that wait for one another."""
    places = [place for place, event in enumerate(events) if event["event"] == "submitted"]
    if not places:
        return []
    first = places.pop()
    while places and events[first].get("after") == events[places[-1]]["job"]:
        first = places.pop()
    return events[first:]


def _why_never_begun(run: Run, since: Events, job: client.JobAttempt | None) -> str:
    """Return why a run's newest job ended before training started: Slurm's reason, or what the end of its log says."""
    if job and job.state in _SLURM_REASONS:
        return _SLURM_REASONS[job.state]
    ended = "its job ended before training started"
    path = Path(str(since[0].get("log") or ""))
    if line := last_error(path, run):
        return f"{ended}: {line}"
    return ended if path.is_file() or not since[0].get("log") else f"{ended} and wrote no log ({path})"


def waits_locally(events: Events) -> bool:
    """Whether a local worker, which several runs share, will start or resume this run."""
    turns = [number for number, event in enumerate(events) if event["event"] in ("submitted", "cancelled")]
    since = events[turns[-1] :] if turns else [{}]
    last, ended = since[0], any(_ends_for_good(event) for event in since[1:])
    if last.get("executor") != "local" or last["host"] != host_name() or ended:
        return False
    started = process_start(int(last["job"]))
    return started is not None and started == last.get("started")  # else another process has this ID


def _ends_for_good(event: dict[str, Any]) -> bool:
    """Whether a local worker continues with its next run after an event, such as a child that was killed."""
    return event["event"] in _ENDS_FOR_GOOD or (event["event"] == "lost" and bool(event.get("reason")))


def _before_evaluation(job: client.JobAttempt | None, cancelled: str) -> str:
    """Return the reason for a trained run whose separately submitted evaluation never started."""
    if cancelled:
        return f"evaluation cancelled {cancelled}"
    if job is None:
        return "evaluation not started"
    return f"evaluation {NEVER_BEGUN}: {_SLURM_REASONS.get(job.state, 'its job ended before it started')}"


def _after_training(evaluation: CommandExecution | None, cancelled: str) -> str:
    """Return the reason for a trained run whose evaluation is not complete."""
    if evaluation is None or evaluation.outcome == "done":
        return ""
    if evaluation.outcome in ("failed", "killed"):
        return f"{EVALUATION_FAILED}: {evaluation.reason}"
    return f"evaluation cancelled {cancelled}" if cancelled else "evaluation not finished"


def _ended_state(
    run: Run, events: Events, executions: Sequence[CommandExecution], job: client.JobAttempt | None
) -> tuple[str, str]:
    """Return state and reason of a run that is not running, queued or done."""
    said = _SLURM_REASONS.get(job.state, "") if job else ""
    fault = job is not None and (
        job.state == "OUT_OF_MEMORY" or (job.state == "FAILED" and job.exit_code != EXIT_REQUEUE)
    )
    if not executions:
        return "not started", ""
    unfinished = [one for one in executions if (one.command, one.outcome) != ("evaluate", "done")]
    if not unfinished:
        return "not started", "only its base model was evaluated"
    last = unfinished[-1]
    if last.outcome == "diverged":
        reasons = [event["reason"] for event in events if event["event"] == "diverged"]
        return "diverged", f"in every attempt ({len(reasons)}), last: {reasons[-1]}"
    if last.outcome == "failed":
        return "failed", last.reason
    if last.outcome == "killed":
        return "failed", said or f"killed: {last.reason}"
    if last.outcome == "preempted":
        why = _SIGNALS.get(last.reason, last.reason)
        saved = "; saved: run or submit it again to resume"
        return "stopped", f"{why}{saved if _has_saved(run, last.command) else _NOTHING_SAVED}"
    if fault and job:
        return "failed", said or f"its job ended with exit code {job.exit_code}"
    go_on = "; run or submit it again to resume" if _has_saved(run, last.command) else _NOTHING_SAVED
    return "died", said or f"{last.reason or 'disappeared without reporting'}{go_on}"


def _has_saved(run: Run, command: str) -> bool:
    """Whether a command would resume: from a checkpoint, or with predictions of an evaluation."""
    kept = "eval/*/*/*.partial" if command == "evaluate" else f"checkpoints/*/*/{files.COMPLETE_MARKER}"
    return any(run.folder.glob(kept))


def _cancelled(events: Events, job: client.JobAttempt | None) -> str:
    """Return who cancelled the run, if the newest event is a cancellation, else ""."""
    by = ""
    for event in events:
        if event["event"] == "cancelled":
            by = f"by {event['by']}"
        elif event["event"] in ("start", "evaluating", "submitted"):
            by = ""
    if not by and job and job.state.startswith("CANCELLED"):
        return "by scancel" if job.by else "in Slurm"
    return by


def _interruptions(events: Events, executions: Sequence[CommandExecution]) -> str:
    """Return counts of signals, crashes and divergences that interrupted training."""
    words = [_SIGNALS.get(one.reason, one.reason) for one in executions if one.outcome == "preempted"]
    words += ["killed" for one in executions if one.outcome in ("killed", "lost")]
    words += ["diverged" for event in events if event["event"] == "diverged"]
    return ", ".join(f"{word} {words.count(word)} times".replace(" 1 times", " once") for word in dict.fromkeys(words))


def _last_records(path: Path) -> list[dict[str, Any]]:
    """Return the last records of a log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        if size > _TAIL_BYTES:
            file.readline()
        return jsonl.parse_jsonl_log(file.read())


def _total(run: Run, events: Events) -> int | None:
    """Return the total number of training steps; None if unknown."""
    if run.done_marker.exists():
        return int(files.read_json(run.done_marker)["step"])
    totals = [event["total"] for event in events if event["event"] == "training"]
    return totals[-1] if totals else None


def _speed(events: Events, pace: float | None) -> tuple[float | None, float | None]:
    """Return rows per second and tokens per row, as the newest start of training recorded them."""
    known = next((event for event in reversed(events) if event["event"] == "training" and "rows" in event), None)
    return (known["rows"] / pace, known["tokens"]) if known and pace else (None, None)


# States for `ftlib submit`.

FINISHED = "finished"
ACTIVE = "queued or running"
FAILED = "failed"
"""State of runs for which another attempt will probably fail, too."""
MISSING = "missing"
"""State of runs without a result or an active job: not started, cancelled, preempted or lost."""


def submission_states(
    chosen: Iterable[tuple[Run, Config]], site: Site, ask: Callable[[list[str]], dict[str, Job]]
) -> list[str]:
    """Return the states of runs for submission, in order.

    Args:
        ask: job IDs → jobs that Slurm knows; called at most once.

    Raises:
        SlurmUnavailable: from `ask`.
    """
    pairs = [(run, config, _finished(run, config)) for run, config in chosen]
    ids = [job for run, _, finished in pairs if not finished for job in open_jobs(run)]
    jobs, now = ask(ids) if ids else {}, storage_time(site.runs)
    return [  # a run may have finished while Slurm was asked
        FINISHED if finished or _finished(run, config) else _submission_state(run, run_status(run, site, now, jobs))
        for run, config, finished in pairs
    ]


def _finished(run: Run, config: Config) -> bool:
    """Whether a run is trained and, if its config requires it, evaluated."""
    folders = (run.evaluation_folder(config.data.source, split, "after") for split in config.evaluation.splits)
    return run.done_marker.exists() and all(files.is_complete(folder) for folder in folders)


def _submission_state(run: Run, found: RunStatus) -> str:
    if found.state in ("running", "evaluating", "queued") or waits_locally(jsonl.read_jsonl_log(run.history)):
        return ACTIVE
    failed = found.state in ("failed", "diverged") or found.reason.startswith(EVALUATION_FAILED)
    return FAILED if failed else MISSING
