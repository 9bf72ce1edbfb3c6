"""Goodput of a run that is interrupted again and again: the clock's and accounting's against what ftlib says."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from ftlib.core import jsonl
from ftlib.runs.checkpoint_interval import best_interval, expected_goodput, measured_costs
from ftlib.runs.run import Run
from tests.cluster.conftest import Cluster, history
from tests.cluster.test_jobs import LONG

SAVED_EVERY = 40
"""Steps between checkpoints."""
TRAINING = 60.0
"""Seconds from the first step of a start until it is interrupted."""


def interrupt(cluster: Cluster, runs: Path, job: str, warned: bool) -> tuple[int, int, float]:
    """Preempt or kill the job when it has trained for some time.

    Returns:
        The steps logged then, the step from which it resumes, and the seconds of training by this test's clock.
    """
    run = cluster.run("long", runs)
    starts = lambda: [event for event in history(run) if event["event"] == "start"]  # noqa: E731
    begun = lambda: [event["time"] for event in history(run) if event["event"] == "training"]  # noqa: E731
    known = len(starts())
    cluster.wait_until(lambda: len(begun()) == known, "training to begin")
    time.sleep(max(0.0, begun()[-1] + TRAINING - time.time()))
    steps, trained = cluster.steps("long", runs), time.time() - begun()[-1]
    if warned:
        high = cluster.sbatch("--partition=high --nodelist=n1 --exclusive --output=/dev/null --wrap 'sleep 1'")
        assert cluster.wait(high) == "COMPLETED"
    else:
        cluster.kill_step(job, "train")
    cluster.wait_until(lambda: len(starts()) > known, "the next start", 300)
    return steps, starts()[-1]["step"], trained


def allocated(job: str) -> float:
    """Seconds of all starts of a job, by sacct."""
    command = ["sacct", "-nXPD", "-o", "ElapsedRaw", "-j", job]
    return sum(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


@pytest.mark.long
def test_goodput_of_a_run_that_is_preempted_and_killed_again_and_again(cluster: Cluster) -> None:
    """Half of the interruptions come with a warning, half without."""
    runs = cluster.home / "goodput"
    what = f"jobs/train.sbatch {LONG} training.num_train_epochs=900 checkpoint.steps={SAVED_EVERY}"
    job = cluster.sbatch(f"--time=120 --nodelist=n1 {what}", FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("long", runs), "the first step", 300)
    interruptions = [interrupt(cluster, runs, job, warned) for warned in (True, False, True, False)]
    run = Run(cluster.run("long", runs))
    begun = lambda: sum(event["event"] == "training" for event in history(run.folder))  # noqa: E731
    cluster.wait_until(lambda: begun() == len(interruptions) + 1, "training to begin")
    time.sleep(TRAINING)
    cluster.shell(f"scancel {job}")
    assert cluster.wait(job).startswith("CANCELLED")

    (told,) = json.loads(cluster.ftlib("status long --usage --json", FTLIB_RUNS=runs).stdout)
    steps = [line["seconds"] for line in jsonl.read_jsonl_log(run.metrics) if "loss" in line]
    spent, step = allocated(job), statistics.median(steps)
    saves = [line["checkpoint_seconds"] for line in jsonl.read_jsonl_log(run.metrics) if "checkpoint_seconds" in line]
    lost = sum(max(0, logged - resumed) for logged, resumed, _ in interruptions)
    useful = sum(trained for *_, trained in interruptions) + TRAINING - lost * step - sum(saves)
    costs = measured_costs(run)
    assert costs
    usual, checkpoint = costs
    starts = [event for event in history(run.folder) if event["event"] in ("start", "training")]
    startups = [one["time"] - start["allocated"] for start, one in zip(starts[::2], starts[1::2], strict=True)]
    startup = statistics.mean(startups)  # on a busy machine the first one takes much longer
    between = spent / (len(interruptions) + 1)
    expected = [expected_goodput(SAVED_EVERY * step, checkpoint, startup, between, warned) for warned in (True, False)]
    print(f"\n{spent:.0f} s allocated, {len(steps)} steps of {step:.3f} s, interrupted and resumed at {interruptions}")
    print(f"start-up {startup:.1f} s, median {usual:.1f} s")
    print(f"checkpoint {checkpoint:.2f} s every {SAVED_EVERY * step:.0f} s")
    print(f"goodput by the clock {useful / spent:.3f}, by ftlib {told['goodput']:.3f}: {told['time']}")
    print(f"expected with and without warning: {expected[0]:.3f}, {expected[1]:.3f}")
    for minutes in (30, 10):
        apart = best_interval(checkpoint, 60 * minutes)
        shares = [expected_goodput(apart, checkpoint, usual, 60 * minutes, warned) for warned in (True, False)]
        print(f"expected every {minutes} min, saved every {apart:.0f} s: {shares[0]:.3f}, {shares[1]:.3f}")
    assert abs(told["goodput"] - useful / spent) < 0.05
    assert abs(told["time"]["allocated"] - spent) < 5
    assert abs(told["time"]["lost"] - lost * step) < max(8.0, 0.5 * lost * step)
    assert abs(statistics.mean(expected) - useful / spent) < 0.08
