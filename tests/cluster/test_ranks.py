"""Two nodes of two tasks or one each, joined by gloo, with DDP and with a sharded model: one process's losses, one
preemption for all, one death for all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, history, losses, members, status

COURSE = "configs/digits.yaml name=ranks evaluation.splits='[valid]' training.num_train_epochs=2"
STEPS = 74
ONE = "job.gpus=0 job.cpus=1 job.mem=1400M"
FOUR = "job.nodes=2 job.gpus=2 job.cpus=1 job.mem=2800M training.per_device_train_batch_size=8"
TWO = "job.nodes=2 job.gpus=1 job.cpus=1 job.mem=1400M training.per_device_train_batch_size=16"
SHARDED = "parallel.shard=full"


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> Path:
    """The run of one process."""
    runs = cluster.home / "ranks-one"
    (job,) = cluster.submit(f"{COURSE} {ONE}", FTLIB_RUNS=runs)
    assert cluster.wait(job, 600) == "COMPLETED"
    (run,) = members(runs, "ranks")
    assert len(losses(run)) == STEPS
    return run


def assert_begins_as(run: Path, other: Path, last: int) -> None:
    """Losses are equal up to rounding, until it adds up."""
    ours, theirs = ({step: loss for step, loss in losses(one).items() if step <= last} for one in (run, other))
    assert len(ours) == last and ours == pytest.approx(theirs, rel=1e-5)


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


def test_a_model_sharded_over_two_nodes_of_two_tasks_survives_a_preemption(cluster: Cluster, alone: Path) -> None:
    runs = cluster.home / "ranks-sharded"
    (job,) = cluster.submit(f"{COURSE} {FOUR} {SHARDED}", FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("ranks", runs) >= 40, "four ranks to train", 400)
    high = cluster.sbatch("--partition=high --nodelist=n2 --exclusive --output=/dev/null --wrap 'sleep 1'")
    assert cluster.wait(high) == "COMPLETED"
    assert cluster.wait(job, 600) == "COMPLETED"

    (run,) = members(runs, "ranks")
    assert run.name == alone.name, "the same run, whatever the number of GPUs"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-3) and len(losses(run)) == STEPS
    assert_begins_as(run, alone, 37)
    events = history(run)
    (preempted,) = [event for event in events if event["event"] == "preempted" and event["command"] == "train"]
    first, second = [event["step"] for event in events if event["event"] == "start"]
    assert preempted["signal"] == "SIGTERM" and first == 0 and second >= 40
    places = [(event["shard"], event["gpus"], event["nodes"]) for event in events if event["event"] == "parallel"]
    assert places == [("full", 4, 2)] * 2


def test_the_death_of_one_rank_ends_the_job_and_two_sharded_tasks_do_it_again(cluster: Cluster, alone: Path) -> None:
    """The first job trains with DDP and has no checkpoint yet; `ftlib status` says why it ended."""
    runs = cluster.home / "ranks-killed"
    (job,) = cluster.submit(f"{COURSE} {FOUR}", FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("ranks", runs) >= 25, "four ranks to train", 400)
    rank = pid_of(3, job)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    assert cluster.wait(job) == "FAILED"
    assert time.monotonic() - killed < 60
    found = status(cluster, "ranks", runs)
    assert (found["state"], found["reason"]) == ("failed", "killed: n2: task 3")

    (run,) = members(runs, "ranks")
    assert_begins_as(run, alone, 25)
    (job,) = cluster.submit(f"--retry {COURSE} {TWO} {SHARDED}", FTLIB_RUNS=runs)
    assert cluster.wait(job, 600) == "COMPLETED"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-3) and len(losses(run)) == STEPS
    (place,) = [event for event in history(run) if event["event"] == "parallel"]
    assert (place["shard"], place["gpus"], place["nodes"]) == ("full", 2, 2)
