"""How runs stand: every state, from events as they are written and from Slurm's words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import files, jsonl, lease
from ftlib.core.environment import host_name, process_start
from ftlib.core.lease import storage_time
from ftlib.core.paths import Site
from ftlib.runs.run import Run, find_runs
from ftlib.slurm.client import Job, JobAttempt
from ftlib.slurm.pending import pending_remedy
from ftlib.slurm.status import RunStatus, open_jobs, run_status


def job(state: str, reason: str = "", by: str = "", exit_code: int | None = None) -> Job:
    return Job((JobAttempt(state, exit_code, reason, "n3", 5, by),))


FELL = Job((JobAttempt("CANCELLED", None, "", "", 0),))
"""Slurm's cancellation of what waited for a job that failed."""


START = {"event": "start", "time": 100, "step": 0, "gpus": 1, "host": "n3", "job": "7"}
TRAINING = {"event": "training", "time": 101, "total": 40}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, tmp_path / "runs")


@pytest.fixture
def run(site: Site) -> Run:
    run = Run(site.runs / "digits" / "abc")
    files.write_text(run.config_file, "")
    return run


def tell(run: Run, *events: dict[str, Any]) -> None:
    for event in events:
        jsonl.append_jsonl(run.history, {"host": "n3", "job": "7", "time": 200, **event})


def standing(run: Run, site: Site, known: Job | None = None) -> RunStatus:
    later = time.time() + 3600  # nothing that these tests write looks fresh
    return run_status(run, site, later, {"7": known} if known else {})


def test_a_run_that_lives(run: Run, site: Site) -> None:
    tell(run, START, {"event": "preempted", "signal": "SIGTERM"}, {**START, "step": 3}, TRAINING)
    tell(run, {"event": "preempted", "signal": "SIGTERM"}, {**START, "step": 8}, TRAINING)
    for step in range(1, 11):
        jsonl.append_jsonl(run.metrics, {"step": step, "loss": 1 / step, "seconds": 90.0 if step < 6 else 2.0})
    for _ in range(60):  # no step took so long
        jsonl.append_jsonl(run.metrics, {"step": 10, "split": "valid", "metric": "loss", "seconds": 900.0})
    with lease.acquire_lease(run.folder):
        found = run_status(run, site, storage_time(site.runs), {})
    assert found == RunStatus(
        "digits/abc", "running", "preempted 2 times", 10, 40, 46.0, 46.0 * 30, 0.1, "n3", "7", goodput=found.goodput
    )


@pytest.mark.parametrize(
    ("events", "known", "state", "reason"),
    [
        ([], None, "not started", ""),
        ([{"event": "submitted"}], job("PENDING", "Priority"), "queued", "waits for Priority"),
        ([{"event": "submitted"}], job("RUNNING"), "running", "starting"),
        ([{"event": "submitted"}], job("FAILED"), "never begun", "its job ended before training started"),
        ([{"event": "submitted"}], None, "never begun", "its job ended before training started"),
        ([{"event": "submitted"}], job("OUT_OF_MEMORY"), "never begun",
         "out of memory; request more with job.mem, or sbatch --mem=…"),
        ([{"event": "submitted"}, {"event": "failed", "command": "prepare", "reason": "bad rows"}], job("FAILED"),
         "never begun", "bad rows"),
        ([{"event": "submitted"}, START, {"event": "failed", "reason": "x"}, {"event": "submitted"}], job("FAILED"),
         "never begun", "its job ended before training started"),
        ([START, {"event": "lost", "reason": "killed: SIGKILL"}], None,
         "died", "killed: SIGKILL; run or submit it again to resume"),
        ([{"event": "submitted"}], job("PENDING", "PartitionTimeLimit"), "queued",
         f"waits for PartitionTimeLimit: {pending_remedy('PartitionTimeLimit')}"),
        ([START, {"event": "cancelled", "by": "ann"}], job("CANCELLED", by="1000"), "cancelled", "by ann"),
        ([START, TRAINING, {"event": "done", "step": 40}], None, "done", ""),
        ([START, {"event": "failed", "reason": "out of GPU memory: x"}], None, "failed", "out of GPU memory: x"),
        ([{"event": "failed", "command": "train", "reason": "not prepared"}], None, "failed", "not prepared"),
        ([START, {"event": "diverged", "reason": "loss nan"}, {"event": "gave up"}], None,
         "diverged", "in every attempt (1), last: loss nan"),
        ([START, {"event": "killed", "command": "train", "reason": "out of memory"}], None,
         "failed", "killed: out of memory"),
        ([START, {"event": "diverged", "reason": "x"}, {"event": "restart"}], job("PENDING"),
         "queued", "diverged once"),
        ([START, {"event": "diverged", "reason": "x"}, {"event": "restart"}, {"event": "failed", "reason": "y"}], None,
         "failed", "y"),
        ([{"event": "evaluating"}, {"event": "evaluated"}], None,
         "not started", "only its base model was evaluated"),
        ([{"event": "evaluating"}, {"event": "evaluated"}], job("COMPLETED"),
         "not started", "only its base model was evaluated"),
        ([START, {"event": "evaluating"}, {"event": "evaluated"}], job("NODE_FAIL"), "died", "node failure"),
        ([{"event": "evaluating"}, {"event": "failed", "command": "evaluate", "reason": "x"}], None, "failed", "x"),
        ([START], None, "died", "disappeared without reporting; run or submit it again to resume"),
        ([START], job("NODE_FAIL"), "died", "node failure"),
        ([START], job("TIMEOUT"), "died", "time limit"),
        ([START], job("OUT_OF_MEMORY"), "failed", "out of memory; request more with job.mem, or sbatch --mem=…"),
        ([START], job("FAILED", exit_code=139), "failed", "its job ended with exit code 139"),
        ([START], job("FAILED", exit_code=75),
         "died", "disappeared without reporting; run or submit it again to resume"),
        ([START, {"event": "preempted", "signal": "SIGUSR1"}], None,
         "stopped", "time limit; saved: run or submit it again to resume"),
        ([START, {"event": "preempted", "signal": "SIGUSR1"}], job("PENDING", "BeginTime"),
         "queued", "time limit once; waits for BeginTime"),
        ([START, {"event": "preempted", "signal": "SIGTERM"}], job("CANCELLED", by="1000"),
         "cancelled", "by scancel"),
        ([{"event": "submitted"}], job("CANCELLED"), "cancelled", "in Slurm"),
        ([START, {"event": "failed", "reason": "x"}], job("RUNNING"), "failed", "x"),
        ([START, {"event": "failed", "reason": "x"}], job("PENDING", "BeginTime"), "queued", "waits for BeginTime"),
        ([{"event": "submitted"}, START, {"event": "preempted", "signal": "SIGUSR1"}], job("RUNNING"),
         "running", "starting"),
        ([START, {"event": "cancelled", "by": "ann"}, {"event": "preempted", "signal": "SIGTERM"}], None,
         "cancelled", "by ann"),
        ([START, {"event": "diverged", "reason": "x"}], None, "died",
         "disappeared without reporting; run or submit it again to resume"),
        ([START, {"event": "cancelled", "by": "ann"}, START, {"event": "failed", "reason": "x"}], None,
         "failed", "x"),
    ],
)  # fmt: skip
def test_states(run: Run, site: Site, events: list[dict[str, Any]], known: Job | None, state: str, reason: str) -> None:
    tell(run, *events)
    if state == "done":
        files.write_json(run.done_marker, {"step": 40})
    if "to resume" in reason:
        assert ", before anything was saved; run or submit it again" in standing(run, site, known).reason
        files.write_text(run.checkpoint_root() / "checkpoint-3" / files.COMPLETE_MARKER, "{}")
    found = standing(run, site, known)
    assert (found.state, found.reason) == (state, reason)


@pytest.mark.parametrize(
    ("events", "known", "state", "reason"),
    [
        ([], job("RUNNING"), "evaluating", ""),
        ([], job("TIMEOUT"), "done", "evaluation not finished"),
        ([], None, "done", "evaluation not finished"),
        ([{"event": "evaluated"}], None, "done", ""),
        ([{"event": "failed", "command": "evaluate", "reason": "no mask decoder"}], None,
         "done", "evaluation failed: no mask decoder"),
    ],
)  # fmt: skip
def test_evaluation(
    run: Run, site: Site, events: list[dict[str, Any]], known: Job | None, state: str, reason: str
) -> None:
    tell(run, START, {"event": "done"}, {"event": "evaluating", "command": "evaluate"}, *events)
    files.write_json(run.done_marker, {"step": 40})
    found = standing(run, site, known)
    assert (found.state, found.reason, found.total) == (state, reason, 40)


def test_a_heartbeat_that_stopped_is_no_life(run: Run, site: Site) -> None:
    tell(run, START)
    files.write_json(run.owner, {"host": "elsewhere", "pid": 1, "started": "1", "job": "7", "token": "t"})
    now = run.owner.stat().st_mtime
    assert run_status(run, site, now + lease.STALE_SECONDS - 1, {}).state == "running"
    assert run_status(run, site, now + lease.STALE_SECONDS + 1, {}).state == "died"


def test_a_long_log_is_read_from_its_end(run: Run, site: Site) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5, "seconds": 1.0}) for step in range(1, 9001)]
    files.write_text(run.metrics, "\n".join(lines) + '\n{"step": 9001, "lo')
    assert run.metrics.stat().st_size > 1 << 17  # many times what is read
    assert standing(run, site).step == 9000


def test_torn_lines_hide_nothing_else(run: Run, site: Site) -> None:
    for path, record in ((run.metrics, {"step": 3}), (run.history, {**START, "event": "start"})):
        files.write_text(path, '{"step": 1, "lo')
        jsonl.append_jsonl(path, record)
    found = standing(run, site)
    assert (found.state, found.step) == ("died", 3)


def test_runs_by_name_and_all(run: Run, site: Site) -> None:
    other = Run(site.runs / "digits" / "def")
    files.write_text(other.config_file, "")
    third = Run(site.runs / "x" / "abc")
    files.write_text(third.config_file, "")
    files.write_text(site.runs / ".jobs" / "12" / "config.yaml", "")  # a job's own copy
    assert find_runs([], site) == [run, other, third]
    assert find_runs(["digits", "digits/abc"], site) == [run, other]
    assert find_runs([str(third.folder)], site) == [third]


def test_of_several_jobs_the_one_that_matters(run: Run, site: Site) -> None:
    """A training that failed cancels the evaluation that depends on it; a retry waits while old jobs are known."""
    tell(run, {"event": "submitted", "executor": "slurm"}, {"event": "submitted", "executor": "slurm", "job": "8"})
    later = time.time() + 3600
    found = run_status(run, site, later, {"7": job("PENDING", "Priority"), "8": job("PENDING", "Dependency")})
    assert (found.state, found.reason, found.job) == ("queued", "waits for Priority", "7")
    tell(run, START, {"event": "failed", "reason": "no space"})
    found = run_status(run, site, later, {"7": job("FAILED"), "8": FELL})
    assert (found.state, found.reason, found.job) == ("failed", "no space", "7")
    tell(run, {"event": "submitted", "executor": "slurm", "job": "9"})
    found = run_status(run, site, later, {"7": job("FAILED"), "8": FELL, "9": job("RUNNING")})
    assert (found.state, found.reason, found.job) == ("running", "starting", "9")
    found = run_status(run, site, later, {"7": job("FAILED"), "8": FELL, "9": job("CANCELLED", by="1000")})
    assert (found.state, found.reason, found.job) == ("cancelled", "by scancel", "9")


def test_a_training_that_never_began_takes_its_evaluation_with_it(run: Run, site: Site) -> None:
    tell(run, {"event": "submitted"}, {"event": "submitted", "job": "8"})
    found = run_status(run, site, time.time(), {"7": job("FAILED"), "8": FELL})
    assert (found.state, found.reason, found.job) == ("never begun", "its job ended before training started", "7")


@pytest.mark.parametrize(
    ("known", "state", "reason"),
    [
        ({"7": job("COMPLETING"), "8": job("PENDING", "Dependency")}, "queued", "waits for Dependency"),
        ({"8": job("RUNNING")}, "evaluating", "starting"),
        ({"8": job("CANCELLED", by="1000")}, "done", "evaluation cancelled by scancel"),
        ({"8": job("TIMEOUT")}, "done", "evaluation never begun: time limit"),
        ({"8": job("FAILED")}, "done", "evaluation never begun: its job ended before it started"),
        ({"7": job("COMPLETED")}, "done", "evaluation not started"),
        ({"7": job("FAILED"), "8": FELL}, "done", "evaluation not started"),
        ({}, "done", "evaluation not started"),
    ],
)
def test_a_submitted_evaluation_that_has_not_begun(
    run: Run, site: Site, known: dict[str, Job], state: str, reason: str
) -> None:
    tell(run, {"event": "submitted"}, {"event": "submitted", "job": "8"}, START, {"event": "done"})
    files.write_json(run.done_marker, {"step": 40})
    assert open_jobs(run) == ["7", "8"]
    found = run_status(run, site, time.time(), known)
    assert (found.state, found.reason) == (state, reason)
    tell(run, {"event": "evaluating", "job": "8"}, {"event": "evaluated", "job": "8"})
    assert open_jobs(run) == []


def test_an_evaluation_begun_by_hand_lives_while_it_answers(run: Run, site: Site) -> None:
    """Whatever became of the job that trained."""
    tell(run, START, {"event": "done"}, {"event": "evaluating", "job": None, "time": time.time()})
    files.write_json(run.done_marker, {"step": 40})
    assert run_status(run, site, time.time(), {"7": job("COMPLETED")}).state == "evaluating"
    found = standing(run, site, job("COMPLETED"))
    assert (found.state, found.reason) == ("done", "evaluation not finished")


def test_a_run_that_waits_for_a_process_of_this_machine(run: Run, site: Site) -> None:
    here = {"event": "submitted", "executor": "local", "host": host_name(), "started": process_start(os.getpid())}
    tell(run, {**here, "job": str(os.getpid())})
    assert (standing(run, site).state, open_jobs(run)) == ("queued", [])
    tell(run, {**here, "job": str(os.getpid()), "started": "1"})  # another process had this number
    assert standing(run, site).state == "never begun"
    tell(run, {**here, "job": str(2**22 + 1)})
    assert standing(run, site).state == "never begun"


def test_who_has_ended_well_is_not_asked_for(run: Run, site: Site) -> None:
    tell(run, START, {"event": "done"})
    assert open_jobs(run) == ["7"]
    files.write_json(run.done_marker, {"step": 1})
    assert open_jobs(run) == []
    tell(run, {"event": "evaluating", "job": "8"})
    assert open_jobs(run) == ["7", "8"]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("starting\nftlib: image /x is not there. Build it: sbatch jobs/build.sbatch\nsrun: error: task 0\n",
         "image /x is not there. Build it: sbatch jobs/build.sbatch"),
        ("one\nbash: /nowhere: No such file or directory\nend\n", "bash: /nowhere: No such file or directory"),
        ("only this\n", "only this"),
    ],
)  # fmt: skip
def test_the_log_says_why_a_run_never_began(run: Run, site: Site, log: str, reason: str) -> None:
    path = run.folder / "7_0_log.out"
    tell(run, {"event": "submitted", "executor": "slurm", "log": str(path), "after": None})
    assert standing(run, site).reason.endswith(f"wrote no log ({path})")
    path.write_text(log)
    assert standing(run, site).reason == f"its job ended before training started: {reason}"
    tell(run, {"event": "submitted", "executor": "slurm", "log": "/etc/passwd", "after": None})
    assert standing(run, site).reason == "its job ended before training started", "not in a log folder"


def test_a_job_of_which_nobody_tells_is_not_over(run: Run, site: Site) -> None:
    tell(run, {"event": "submitted", "executor": "slurm"})
    found = run_status(run, site, time.time(), None)
    assert (found.state, found.reason) == ("not started", "submitted as job 7; Slurm does not answer")


def test_a_fresh_heartbeat_of_a_job_that_has_ended_is_no_life(run: Run, site: Site) -> None:
    tell(run, START)
    files.write_json(run.owner, {"host": "elsewhere", "pid": 1, "started": "1", "job": "7", "token": "t"})
    now = run.owner.stat().st_mtime + 1
    assert run_status(run, site, now, {"7": job("RUNNING")}).state == "running"
    assert run_status(run, site, now, {"7": job("FAILED", exit_code=137)}).state == "failed"
    assert run_status(run, site, now, {"7": job("PENDING", "BeginTime")}).state == "queued"
    tell(run, {"event": "killed", "command": "train", "reason": "signal 9", "time": now})
    found = run_status(run, site, now, {})
    assert (found.state, found.reason) == ("failed", "killed: signal 9")
