"""What a run has cost and what its time was used for, from its history and from Slurm's accounting."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import jsonl
from ftlib.runs.checkpoint_interval import advice, best_interval, expected_goodput, measured_costs
from ftlib.runs.run import Run
from ftlib.runs.usage import Allocation, describe, usage


def make(folder: Path, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Run:
    run = Run(folder)
    for event in events:
        jsonl.append_jsonl(run.history, {"host": "n1", "job": "7", "gpus": 2, **event})
    for line in metrics:
        jsonl.append_jsonl(run.metrics, {"attempt": 0, **line})
    return run


def steps(first: int, last: int, seconds: float = 10.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0, "seconds": seconds} for step in range(first, last + 1)]


INTERRUPTED = [
    {"event": "start", "time": 1060, "allocated": 1000, "step": 0},
    {"event": "training", "time": 1100, "total": 80},
    {"event": "killed", "time": 1600, "command": "train"},  # after 50 steps, 20 of them since the last checkpoint
    {"event": "start", "time": 2050, "allocated": 2000, "step": 30},
    {"event": "training", "time": 2100, "total": 80},
    {"event": "done", "time": 2620, "step": 80},
    {"event": "evaluating", "time": 2640, "allocated": 2000},
    {"event": "evaluated", "time": 2700},
]


def test_allocated_time_by_purpose_from_the_history(tmp_path: Path) -> None:
    lines = [*steps(1, 30), {"step": 31, "loss": 1.0, "seconds": 10.0, "checkpoint_seconds": 4.0}, *steps(32, 80)]
    found = usage(make(tmp_path, INTERRUPTED, lines))
    spent = found.time
    assert (spent.allocated, spent.training, spent.lost) == (600 + 700, 800, 200)
    assert (spent.startup, spent.saving, spent.evaluation, spent.other) == (100 + 100 + 20, 4, 60, 1300 - 1284)
    assert spent.goodput == 800 / 1300
    assert (found.attempts, found.hours, found.evaluate) == (3, 2 * 1300 / 3600, 2 * 60 / 3600)
    assert describe(spent) == "goodput 62% (start-up 17%, lost steps 15%, evaluation 5%, other 1%)"


def test_slurm_knows_more_than_the_history(tmp_path: Path) -> None:
    """A start that died in its container, and what a job does before and after ftlib's own records."""
    allocations = [
        Allocation("7", 900, 930, gpus=2, cpus=8, cpu_seconds=30),
        Allocation("7", 990, 1610, queued=60, gpus=2, cpus=8, cpu_seconds=1240),
        Allocation("7", 1990, 2710, queued=380, gpus=2, cpus=8, cpu_seconds=None),
    ]
    found = usage(make(tmp_path, INTERRUPTED, steps(1, 80)), allocations)
    assert found.time.allocated == 30 + 620 + 720 and found.hours == pytest.approx(2 * 1370 / 3600)
    assert (found.time.startup, found.time.queued) == (30 + 110 + 110 + 20, 440)
    assert (found.cpus, found.cpus_used) == (8, pytest.approx(1270 / 650))


def test_the_first_step_of_a_start_does_not_count_its_warm_up(tmp_path: Path) -> None:
    events = [
        {"event": "start", "time": 0, "step": 0},
        {"event": "training", "time": 10, "total": 9},
        {"event": "done", "time": 200},
    ]
    spent = usage(make(tmp_path, events, [*steps(1, 1, 100.0), *steps(2, 9)])).time
    assert (spent.training, spent.startup) == (90, 10 + 90)


def test_attempts_that_diverged_are_lost(tmp_path: Path) -> None:
    events = [
        {"event": "start", "time": 0, "step": 0},
        {"event": "training", "time": 0, "total": 4},
        {"event": "diverged", "time": 40},
        {"event": "restart", "time": 40},
        {"event": "done", "time": 80},
    ]
    second = [{**line, "attempt": 1} for line in steps(1, 4)]
    spent = usage(make(tmp_path, events, [*steps(1, 4), *second])).time
    assert (spent.training, spent.lost, spent.goodput) == (40, 40, 0.5)


def test_nothing_has_happened(tmp_path: Path) -> None:
    found = usage(Run(tmp_path / "none"))
    assert (found.hours, found.time.goodput, describe(found.time)) == (0, None, "")


# The interval between checkpoints.


def simulate(interval: float, checkpoint: float, startup: float, between: float) -> float:
    """Goodput of a long run that is killed at random (exponential) moments, step by step."""
    draw, useful, total = random.Random(0), 0.0, 0.0
    while total < 3000 * between:
        left = draw.expovariate(1 / between)
        total += left
        left -= startup
        useful += max(0, int(left // (interval + checkpoint))) * interval
    return useful / total


def test_the_best_interval_is_the_best_in_a_simulation() -> None:
    checkpoint, startup, between = 20.0, 60.0, 3600.0
    best = best_interval(checkpoint, between)
    assert best == pytest.approx(367, abs=1)  # Young's first order: sqrt(2 · 20 · 3600) = 379
    goodputs = {factor: simulate(best * factor, checkpoint, startup, between) for factor in (0.3, 0.6, 1, 1.7, 3)}
    assert max(goodputs, key=lambda factor: goodputs[factor]) == 1
    assert expected_goodput(best, checkpoint, startup, between) == pytest.approx(goodputs[1], abs=0.02)


def test_goodput_of_regular_preemptions() -> None:
    assert expected_goodput(300, 2, 40, 1800, warned=True) == pytest.approx((1800 - 42) / 1800 * 300 / 302)
    assert best_interval(100, 20) == 20


def test_advice_for_a_run_that_loses_much(tmp_path: Path) -> None:
    lines = [{**line, "checkpoint_seconds": 4.0} if line["step"] in (31, 61) else line for line in steps(1, 80)]
    run = make(tmp_path, INTERRUPTED, lines)
    assert measured_costs(run) == (100, 4)
    told = advice(run, usage(run).time)
    assert told.startswith(
        "killed 1 time, a checkpoint takes 4.0 s and comes every 6.7 min; with checkpoint.minutes=1.7"
    )
    assert not advice(make(tmp_path / "b", INTERRUPTED[3:], lines), usage(run).time)
