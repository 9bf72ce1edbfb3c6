"""What a run has cost, and how much of it was training: allocated time by purpose, GPU-hours, CPUs in use.

Goodput is the share of the allocated time in which steps were computed that the result contains. The rest of the
allocated time is start-up (container, stage, prepare, loading, starts that died), lost steps, saving, evaluation, and
what is left over. Time in the queue is not allocated; it is counted apart.

Allocations are Slurm's own (`Slurm.allocations`). Without them, a start counts from the moment when jobs/run.sh began
(`allocated` in the history) until its last event.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ftlib.core import jsonl
from ftlib.runs import events as runs_events
from ftlib.runs.events import CommandExecution
from ftlib.runs.run import Run

_CLOCK_SKEW = 60.0
"""Seconds by which a node's clock may be behind that of Slurm's controller."""

_NOTHING_LOST = ("done", "preempted", "")
"""Outcomes of training after which no step has to be repeated; "" is that of a training that is running."""


@dataclass(frozen=True)
class Allocation:
    """One start of a job on its nodes.

    Attributes:
        job: its id.
        start, end: seconds since 1970; of a running job, `end` is now.
        queued: seconds from its submission (or requeueing) to its start.
        gpus: None if unknown.
        cpus: allocated CPU cores, None if unknown.
        cpu_seconds: CPU time of its ended steps; None while it runs, and if unknown.
        gpu_utilization: mean of its steps in percent; None where the site does not collect it.
    """

    job: str
    start: float
    end: float
    queued: float = 0.0
    gpus: int | None = None
    cpus: int | None = None
    cpu_seconds: float | None = None
    gpu_utilization: float | None = None

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)


@dataclass(frozen=True)
class TimeUse:
    """Allocated seconds of a run by purpose; they add up to `allocated`, but for the accuracy of Slurm's seconds.

    Attributes:
        training: steps that the result (or the newest checkpoint) contains.
        startup: until the first step of a start or the first row of an evaluation; starts that died before it.
        lost: steps that were computed and had to be repeated, and attempts that diverged.
        saving: checkpoints.
        evaluation: during and after training.
        other: the rest, such as writing the result and the end of a job.
        queued: waiting for Slurm, not allocated; 0 if unknown.
    """

    allocated: float = 0.0
    training: float = 0.0
    startup: float = 0.0
    lost: float = 0.0
    saving: float = 0.0
    evaluation: float = 0.0
    other: float = 0.0
    queued: float = 0.0

    @property
    def goodput(self) -> float | None:
        """Training time / allocated time; None before any time was allocated."""
        return self.training / self.allocated if self.allocated else None

    def __add__(self, more: TimeUse) -> TimeUse:
        return TimeUse(*(getattr(self, one.name) + getattr(more, one.name) for one in fields(self)))


@dataclass(frozen=True)
class Usage:
    """The cost of a run.

    Attributes:
        attempts: executions of train and evaluate.
        train: GPU-hours of everything but evaluations: of training, of starting it, and of the ends of jobs.
        evaluate: GPU-hours of evaluations.
        time: allocated time by purpose.
        cpus, cpus_used: allocated CPU cores and how many of them were busy, means over the time for which both are
            known; None if it is not.
        gpu_utilization: percent; None where it is not collected.
    """

    attempts: int
    train: float
    evaluate: float
    time: TimeUse = TimeUse()
    cpus: float | None = None
    cpus_used: float | None = None
    gpu_utilization: float | None = None

    @property
    def hours(self) -> float:
        """GPU-hours of the whole allocation."""
        return self.train + self.evaluate


def usage(run: Run, allocations: Sequence[Allocation] = ()) -> Usage:
    """Return the cost of a run so far.

    Args:
        allocations: those of the run's jobs that Slurm knows, the oldest first; other jobs are taken from the history.
    """
    executions = runs_events.read_executions(run)
    events, metrics = jsonl.read_jsonl_log(run.history), jsonl.read_jsonl_log(run.metrics)
    last = runs_events.last_activity(run)
    spent, gpu_seconds, evaluating = TimeUse(), 0.0, 0.0
    for allocation, own in _by_allocation(executions, allocations, last):
        gpus = allocation.gpus if allocation.gpus is not None else max((one.gpus for one in own), default=0)
        part = _allocated_time(allocation, own, last)
        spent += part
        gpu_seconds += gpus * allocation.seconds
        evaluating += gpus * part.evaluation
    spent += _training_time(events, executions, metrics, last)
    spent += TimeUse(other=max(0.0, spent.allocated - sum(getattr(spent, one) for one in _PURPOSES)))
    cpus, used, utilization = _means(allocations)
    attempts = sum(1 for one in executions if one.command in ("train", "evaluate"))
    return Usage(attempts, (gpu_seconds - evaluating) / 3600, evaluating / 3600, spent, cpus, used, utilization)


_PURPOSES = ("training", "startup", "lost", "saving", "evaluation")


def _by_allocation(
    executions: Sequence[CommandExecution], allocations: Sequence[Allocation], last: float
) -> Iterator[tuple[Allocation, list[CommandExecution]]]:
    """Yield every allocation with the executions in it."""
    known = {one.job for one in allocations}
    starts = [one.started + _CLOCK_SKEW for one in executions]
    owner = [
        max((at for at, a in enumerate(allocations) if a.job == one.job and a.start <= start), default=None)
        for one, start in zip(executions, starts, strict=True)
    ]
    for number, allocation in enumerate(allocations):
        yield allocation, [one for one, at in zip(executions, owner, strict=True) if at == number]
    others: dict[Any, list[CommandExecution]] = {}
    for number, one in enumerate(executions):
        if one.job not in known:
            others.setdefault((one.job, one.allocated) if one.allocated else number, []).append(one)
    for own in others.values():
        start = own[0].allocated or own[0].started
        end = max(one.ended or last for one in own)
        yield Allocation(own[0].job, min(start, end), end, gpus=max(one.gpus for one in own)), own


def _allocated_time(allocation: Allocation, own: Sequence[CommandExecution], last: float) -> TimeUse:
    """Return the start-up and evaluation of an allocation; its training time is that of the steps."""
    windows = [_window(one, last) for one in own]
    inside = [(max(begin, allocation.start), min(end, allocation.end)) for begin, end in filter(None, windows)]
    busy = sum(max(0.0, end - begin) for begin, end in inside)
    tail = allocation.end - max((end for _, end in inside), default=allocation.end)
    evaluations = [_window(one, last) for one in own if one.command == "evaluate"]
    evaluating = sum(end - begin for begin, end in filter(None, evaluations))
    startup = max(0.0, allocation.seconds - busy - max(0.0, tail))
    return TimeUse(allocation.seconds, startup=startup, evaluation=evaluating, queued=allocation.queued)


def _window(one: CommandExecution, last: float) -> tuple[float, float] | None:
    """Return when an execution did what it is for; None if it died before."""
    begin = one.training if one.command == "train" else one.started if one.command == "evaluate" else None
    return None if begin is None else (begin, max(begin, one.ended or last))


def _training_time(
    events: list[dict[str, Any]], executions: Sequence[CommandExecution], metrics: list[dict[str, Any]], last: float
) -> TimeUse:
    """Return what the time between the first and the last step of every start was used for."""
    attempt = sum(event["event"] == "diverged" for event in events)  # the one that is kept; the others diverged
    starts = [one for one in executions if one.command == "train" and one.training is not None]
    steps = [line for line in metrics if "loss" in line]
    usual = statistics.median(line.get("seconds", 0.0) for line in steps) if steps else 0.0
    spent = TimeUse()
    for number, one in enumerate(starts):
        begin = (one.attempt, one.step)
        end = (starts[number + 1].attempt, starts[number + 1].step) if number + 1 < len(starts) else (attempt + 1, 0)
        own = [line for line in metrics if begin < (line.get("attempt", 0), line["step"]) <= end]
        good = [line for line in own if "loss" in line and line.get("attempt", 0) == attempt]
        first = max(0.0, good[0].get("seconds", 0.0) - usual) if good else 0.0
        part = TimeUse(
            training=sum(line.get("seconds", 0.0) for line in good) - first,
            lost=sum(line.get("seconds", 0.0) for line in own if "loss" in line and line.get("attempt", 0) != attempt),
            saving=sum(line.get("checkpoint_seconds", 0.0) for line in own),
            evaluation=sum(line.get("seconds", 0.0) for line in own if "split" in line),
        )
        begin_at, end_at = _window(one, last) or (0.0, 0.0)
        rest = max(0.0, end_at - begin_at - sum(getattr(part, purpose) for purpose in _PURPOSES))
        warm_up = min(first, rest)  # of a start's first step: data loading, compilation
        part += TimeUse(startup=warm_up, lost=0.0 if one.outcome in _NOTHING_LOST else rest - warm_up)
        spent += part
    return spent


def _means(allocations: Iterable[Allocation]) -> tuple[float | None, float | None, float | None]:
    """Return allocated CPUs, busy CPUs and GPU utilization, weighted by time."""
    known = [one for one in allocations if one.cpus and one.cpu_seconds is not None and one.seconds]
    seconds = sum(one.seconds for one in known)
    cpus = sum(one.seconds * (one.cpus or 0) for one in known) / seconds if seconds else None
    used = sum(one.cpu_seconds or 0.0 for one in known) / seconds if seconds else None
    watched = [one for one in allocations if one.gpu_utilization is not None and one.seconds]
    total = sum(one.seconds for one in watched)
    utilization = sum(one.seconds * (one.gpu_utilization or 0.0) for one in watched) / total if total else None
    return cpus, used, utilization


def describe(spent: TimeUse) -> str:
    """Return goodput and the other purposes as text, such as `goodput 91% (start-up 5%, saving 4%)`; "" if unknown."""
    if spent.goodput is None or not spent.training:
        return ""
    names = {
        "startup": "start-up",
        "lost": "lost steps",
        "saving": "saving",
        "evaluation": "evaluation",
        "other": "other",
    }
    shares = {name: getattr(spent, field) / spent.allocated for field, name in names.items()}
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    return f"goodput {spent.goodput:.0%}" + (f" ({told})" if told else "")
