"""How often to save: the interval that costs a run the least time, from what a start and a checkpoint cost.

A run that is killed without a warning (a lost node, a preemption without grace time) repeats the steps since its last
checkpoint. Saving more often repeats less and costs more. The best interval is J. T. Daly's "A higher order estimate of
the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22 (2006), equation 37; its first
term is J. W. Young's "A first order approximation to the optimum checkpoint interval", CACM 17 (1974). All times are in
seconds.
"""

from __future__ import annotations

import math
import statistics

from ftlib.core import jsonl
from ftlib.runs import events as runs_events
from ftlib.runs.run import Run
from ftlib.runs.usage import TimeUse

_WORTH_A_WORD = 0.01
"""Gain in goodput below which no other interval is recommended."""


def best_interval(checkpoint: float, between: float) -> float:
    """Return the time between checkpoints with the highest goodput.

    Args:
        checkpoint: what writing one takes.
        between: mean time between interruptions without a warning.
    """
    if checkpoint >= 2 * between:
        return between
    ratio = math.sqrt(checkpoint / (2 * between))
    return math.sqrt(2 * checkpoint * between) * (1 + ratio / 3 + ratio**2 / 9) - checkpoint


def expected_goodput(interval: float, checkpoint: float, startup: float, between: float, warned: bool = False) -> float:
    """Return the expected share of the allocated time that is training.

    Args:
        interval: training time between checkpoints.
        checkpoint: what writing one takes.
        startup: from the start of a job to its first step.
        between: time between interruptions.
        warned: whether a signal comes early enough to save; else half an interval is lost on average.
    """
    lost = checkpoint if warned else (interval + checkpoint) / 2
    return max(0.0, (between - startup - lost) / between) * interval / (interval + checkpoint)


def measured_costs(run: Run) -> tuple[float, float] | None:
    """Return the median start-up and checkpoint times of a run; None if either has not been measured yet."""
    starts = [one for one in runs_events.read_executions(run) if one.command == "train" and one.training is not None]
    startups = [(one.training or 0.0) - (one.allocated or one.started) for one in starts]
    saves = [line["checkpoint_seconds"] for line in jsonl.read_jsonl_log(run.metrics) if "checkpoint_seconds" in line]
    return (statistics.median(startups), statistics.median(saves)) if startups and saves else None


def advice(run: Run, spent: TimeUse) -> str:
    """Return which interval would suit a run that was killed without a warning better than its own; "" if none would.

    Args:
        spent: the run's time so far.
    """
    kills = sum(
        one.command == "train" and one.outcome in ("killed", "lost") for one in runs_events.read_executions(run)
    )
    saves = sum("checkpoint_seconds" in line for line in jsonl.read_jsonl_log(run.metrics))
    costs = measured_costs(run)
    if not kills or not costs:
        return ""
    startup, checkpoint = costs
    between, own = spent.allocated / kills, spent.training / saves
    best = best_interval(checkpoint, between)
    now, then = (expected_goodput(each, checkpoint, startup, between) for each in (own, best))
    if then - now < _WORTH_A_WORD:
        return ""
    told = f"killed {kills} {'time' if kills == 1 else 'times'}, a checkpoint takes {checkpoint:.1f} s and comes every"
    return (
        f"{told} {own / 60:.1f} min; with checkpoint.minutes={max(0.1, best / 60):.1f} (and checkpoint.steps not below "
        f"that) about {then:.0%} of the time would be training instead of {now:.0%}"
    )
