"""What happened to a run, written as it happens and read back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import files, jsonl
from ftlib.core.signals import Preempted
from ftlib.errors import TrainingDiverged, UserError
from ftlib.runs import events as runs_events
from ftlib.runs.run import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_GPUS_ON_NODE",
        "SLURM_JOB_NUM_NODES",
        "FTLIB_LOG",
        "SLURM_PROCID",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    return Run(tmp_path / "run")


def write(run: Run, *events: dict[str, Any]) -> None:
    for event in events:
        jsonl.append_jsonl(run.history, {"host": "n1", "job": "7", **event})


@pytest.mark.parametrize(
    ("error", "ending", "reason"),
    [
        (Preempted("SIGTERM"), "preempted", "SIGTERM"),
        (TrainingDiverged("in every attempt\n  attempt 0"), "diverged", "in every attempt"),
        (UserError("no such split", "Mend it."), "failed", "no such split"),
        (ValueError("a\nb"), "failed", "ValueError: a"),
    ],
)
def test_what_does_not_end_well_says_why(run: Run, error: BaseException, ending: str, reason: str) -> None:
    with pytest.raises(type(error)), runs_events.record_outcome(run, "train", 0.0):
        runs_events.record_start(run, "train", step=0)
        raise error
    (attempt,) = runs_events.read_executions(run)
    assert (attempt.outcome, attempt.reason) == (ending, reason)
    assert attempt.ended is not None and attempt.ended >= attempt.started


def test_a_mistake_before_the_start_is_told_too(run: Run) -> None:
    with pytest.raises(UserError), runs_events.record_outcome(run, "train", 0.0):
        raise UserError("not prepared")
    (attempt,) = runs_events.read_executions(run)
    assert (attempt.command, attempt.outcome, attempt.reason) == ("train", "failed", "not prepared")


def test_of_many_processes_the_first_one_tells_of_a_signal_and_each_of_its_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(Preempted), runs_events.record_outcome(run, "train", 0.0):
        raise Preempted("SIGTERM")
    assert not run.history.exists()
    with pytest.raises(UserError), runs_events.record_outcome(run, "train", 0.0):
        raise UserError("out of GPU memory")
    assert runs_events.read_executions(run)[0].reason == "out of GPU memory"
    monkeypatch.setenv("FTLIB_JOB_TMP", str(run.folder))
    for rank in ("1", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(UserError), runs_events.record_outcome(run, "train", 0.0):
            raise UserError(f"no such file, says {rank}")
    assert [one.reason for one in runs_events.read_executions(run)] == ["out of GPU memory", "no such file, says 1"]


def test_commands_and_jobs_are_kept_apart(run: Run) -> None:
    write(
        run,
        {"event": "start", "time": 0, "gpus": 2},
        {"event": "evaluating", "time": 10, "gpus": 1, "job": "8"},
        {"event": "training", "time": 11, "total": 5},
        {"event": "done", "time": 3600},
        {"event": "evaluating", "time": 4000, "gpus": 1, "job": "9"},
        {"event": "killed", "command": "evaluate", "time": 5000, "job": "8", "reason": "out of memory"},
    )
    train, first, second = runs_events.read_executions(run)
    assert (train.outcome, train.ended, train.training) == ("done", 3600, 11)
    assert (first.outcome, first.reason, first.ended) == ("killed", "out of memory", 5000)
    assert second.ended is None and first.training is None


def test_a_restart_after_a_divergence_costs_on(run: Run) -> None:
    write(
        run,
        {"event": "start", "time": 0, "gpus": 2},
        {"event": "diverged", "time": 900, "reason": "nan"},
        {"event": "restart", "time": 901},
        {"event": "done", "time": 1800},
    )
    (attempt,) = runs_events.read_executions(run)
    assert (attempt.outcome, attempt.reason, attempt.ended) == ("done", "", 1800)


def test_who_died_unheard_ends_with_the_last_sign_of_life(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next submission, nor with the next start: what waits in a queue costs nothing."""
    write(run, {"event": "start", "time": 100, "gpus": 1})
    files.write_text(run.metrics, "")
    files.write_text(run.owner, "")
    os.utime(run.metrics, (150, 150))
    os.utime(run.owner, (160, 160))
    write(run, {"event": "submitted", "time": 9000}, {"event": "cancelled", "time": 9001})
    with run.history.open("a") as file:
        file.write('{"event": "torn')
    seen = runs_events.last_activity(run)
    files.write_text(run.owner, "")  # now it is ours
    with runs_events.record_outcome(run, "train", seen):
        runs_events.record_start(run, "train", step=0)
    lost, again = runs_events.read_executions(run)
    assert (lost.outcome, lost.ended) == ("lost", 160)
    assert again.ended is None and again.outcome == ""


def test_evaluations_of_other_jobs_are_left_open(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run, {"event": "evaluating", "time": 1, "job": "8"}, {"event": "evaluating", "time": 2, "job": "9_1"})
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with runs_events.record_outcome(run, "evaluate", 5.0):
        runs_events.record_start(run, "evaluate")
    assert [(one.job, one.outcome, one.ended) for one in runs_events.read_executions(run)] == [
        ("8", "", None), ("9_1", "lost", 5.0), ("9_1", "", None)]  # fmt: skip


def test_the_gpus_of_the_allocation_and_the_log_are_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("FTLIB_LOG", "/logs/a b.log")
    runs_events.record_start(run, "evaluate")
    assert (runs_events.read_executions(run)[0].gpus, runs_events.read_executions(run)[0].log) == (8, "/logs/a b.log")


def test_the_file_behind_stderr_is_the_log(run: Run, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from ftlib.runs import events, run; "
    code += "events.record_start(run.Run(Path(sys.argv[1])), 'evaluate')"
    command = [sys.executable, "-c", code, run.folder]
    with (tmp_path / "the log").open("w") as log:
        subprocess.run(command, check=True, stderr=log)
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    assert [attempt.log for attempt in runs_events.read_executions(run)] == [str(tmp_path / "the log"), ""]
