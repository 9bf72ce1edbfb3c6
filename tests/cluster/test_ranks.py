"""Two nodes of two tasks each, joined by gloo: one process's losses, one preemption for all, one death for all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, history, losses, members, status

FOUR = "job.nodes=2 job.gpus=2 job.cpus=1 job.mem=2800M training.per_device_train_batch_size=8"
COURSE = "configs/digits.yaml name=four evaluation.splits='[valid]'"


def pid_of(rank: int, job: str) -> int | None:
    """The Python process of a rank of a job's training."""
    wanted = {f"SLURM_PROCID={rank}", f"SLURM_JOB_ID={job}", "FTLIB_STEP=train"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            settings = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            if wanted <= settings and (folder / "comm").read_text().startswith("python"):
                return int(folder.name)
        except OSError:  # it has ended
            continue
    return None


def test_two_nodes_of_two_tasks_are_one_process_and_survive_a_preemption(cluster: Cluster) -> None:
    runs = {name: cluster.home / f"ranks-{name}" for name in ("one", "four")}
    course = f"{COURSE} training.num_train_epochs=3"
    (four,) = cluster.submit(f"{course} {FOUR}", FTLIB_RUNS=runs["four"])
    cluster.wait_until(lambda: cluster.steps("four", runs["four"]) >= 50, "four ranks to train", 400)
    high = cluster.sbatch("--partition=high --nodelist=n2 --exclusive --output=/dev/null --wrap 'sleep 1'")
    assert cluster.wait(high) == "COMPLETED"
    assert cluster.wait(four, 600) == "COMPLETED"
    (one,) = cluster.submit(f"{course} job.gpus=0 job.cpus=1 job.mem=1400M", FTLIB_RUNS=runs["one"])
    assert cluster.wait(one, 600) == "COMPLETED"

    run, other = (members(runs[name], "four")[0] for name in ("four", "one"))
    assert run.name == other.name, "the same run, whatever the number of GPUs"
    assert losses(run) == pytest.approx(losses(other), rel=1e-3) and len(losses(run)) == 111
    begun, alone = ({step: loss for step, loss in losses(one).items() if step <= 37} for one in (run, other))
    assert begun == pytest.approx(alone, rel=1e-5)
    events = history(run)
    (preempted,) = [event for event in events if event["event"] == "preempted" and event["command"] == "train"]
    first, second = [event["step"] for event in events if event["event"] == "start"]
    assert preempted["signal"] == "SIGTERM" and first == 0 and second >= 50


def test_the_death_of_one_rank_ends_the_job_at_once_and_status_says_why(cluster: Cluster) -> None:
    runs = cluster.home / "ranks-killed"
    course = f"{COURSE} training.num_train_epochs=40"
    (job,) = cluster.submit(f"{course} {FOUR}", FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("four", runs) >= 10, "four ranks to train", 400)
    rank = pid_of(3, job)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    assert cluster.wait(job) == "FAILED"
    assert time.monotonic() - killed < 60
    found = status(cluster, "four", runs)
    assert (found["state"], found["reason"]) == ("failed", "killed: n2: task 3")
