"""status and logs, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.paths import find_site
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from tests.conftest import read_lines, start_ftlib

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setenv("PATH", "/nowhere")


def make(store: Path, monkeypatch: pytest.MonkeyPatch, name: str, identity: str, *events: dict[str, object]) -> Run:
    monkeypatch.setenv("FTLIB_RUNS", str(store / "runs"))
    run = Run(store / "runs" / name / identity)
    files.write_text(run.config_file, "")
    for event in events:
        jsonl.append_jsonl(run.history, {"host": "n1", "job": None, **event})
    return run


def test_the_table_and_json(ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ftlib("status")[0] == 0
    run = make(store, monkeypatch, "a", "1", {"event": "start", "time": 5},
               {"event": "failed", "time": 6, "reason": "data.root: nowhere:\nno such folder"})  # fmt: skip
    jsonl.append_jsonl(run.metrics, {"step": 3, "loss": 0.25, "seconds": 2})
    make(store, monkeypatch, "b", "2")
    code, output, _ = ftlib("status")
    lines = [line.split(maxsplit=6) for line in output.splitlines()]
    assert code == 0 and lines[0] == ["run", "state", "step", "s/step", "ETA", "loss", "node  reason"]
    assert lines[2] == ["a/1", "failed", "3", "2.00", "0.2500", "n1", "data.root: nowhere: no such folder"]
    assert lines[3] == ["b/2", "not", "started"]
    (record,) = json.loads(ftlib("status", "a", "--json")[1])
    assert (record["run"], record["state"], record["loss"]) == ("a/1", "failed", 0.25)
    assert ftlib("status", "c")[0] == 2


def test_usage_by_run_and_sweep(ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 3600
    make(store, monkeypatch, "a", "1", {"event": "start", "time": 0, "gpus": 4},
         {"event": "preempted", "time": hour, "signal": "SIGTERM"}, {"event": "start", "time": 9 * hour, "gpus": 2},
         {"event": "done", "time": 10 * hour}, {"event": "evaluating", "time": 10 * hour, "gpus": 1},
         {"event": "evaluated", "time": 10.5 * hour})  # fmt: skip
    make(store, monkeypatch, "a", "2", {"event": "start", "time": 0, "gpus": 1}, {"event": "done", "time": hour})
    output = ftlib("status", "--usage")[1].splitlines()
    assert output[2].split()[:6] == ["a/1", "3", "6.00", "0.50", "6.50", "2.50"]
    assert output[4].split()[:7] == ["a:", "2", "runs", "4", "7.00", "0.50", "7.50"]
    (_, record) = json.loads(ftlib("status", "--usage", "--json")[1])
    assert {name: record[name] for name in ("run", "name", "attempts", "train", "evaluate", "cpus")} == {
        "run": "a/2", "name": "a", "attempts": 1, "train": 1.0, "evaluate": 0.0, "cpus": None}  # fmt: skip


def test_a_real_run_from_mistake_to_scores(
    ftlib: Ftlib, store: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config()
    assert ftlib("train", config)[0] == 2  # not prepared
    (record,) = json.loads(ftlib("status", "--json")[1])
    assert record["state"] == "failed" and "prepare" in record["reason"]
    assert ftlib("prepare", config)[0] == 0
    log = tmp_path / "logs" / "a log"
    log.parent.mkdir()
    for command in ("train", "evaluate"):
        with log.open("a") as file:
            process = [sys.executable, "-m", "ftlib", command, config]
            subprocess.run(process, check=True, stderr=file, stdout=subprocess.DEVNULL)
    (record,) = json.loads(ftlib("status", "tiny", "--json")[1])
    assert (record["state"], record["reason"], record["step"], record["total"]) == ("done", "", 12, 12)
    assert ftlib("logs", "tiny", "-n", "100000")[:2] == (0, log.read_text())
    (run,) = (store / "runs").glob("*/tiny/*")
    assert [event["event"] for event in read_lines(run / "history.jsonl")][-3:] == ["done", "evaluating", "evaluated"]


def test_what_keeps_a_submitted_run_from_its_training(
    ftlib: Ftlib, store: Path, write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(base=str(tmp_path / "no model"), root=str(tmp_path / "no data"))
    assert ftlib("prepare", config)[0] == 2 and not list((store / "runs").iterdir())
    site = find_site()
    run = runs.create_run(load_experiment(config, [], site), site)
    run.log_event("submitted", job="7", executor="slurm", log=None)
    assert ftlib("prepare", config)[0] == 2 and len(read_lines(run.history)) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for command, reason in (("prepare", "no data"), ("stage", "no model: no such folder")):
        assert ftlib(command, config)[0] == 2
        (record,) = json.loads(ftlib("status", "--json")[1])
        assert record["state"] == "never begun" and reason in record["reason"]
    assert ftlib("status", "--usage")[0] == 0


def test_logs_follow_what_is_added_and_the_next_submission(
    ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    first, second = tmp_path / "logs" / "1.log", tmp_path / "logs" / "2.log"
    first.write_text("".join(f"line {number}\n" for number in range(30000)))
    run = make(store, monkeypatch, "a", "1", {"event": "start", "time": 0, "log": str(first)})
    process = start_ftlib("logs", "a", "-f", "-n", "2")
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["line 29998\n", "line 29999\n"]
    with first.open("a") as file:
        file.write("more\n")
    assert process.stdout.readline() == "more\n"
    second.write_text("again\n")
    jsonl.append_jsonl(run.history, {"event": "start", "time": 1, "log": str(second), "host": "", "job": None})
    assert process.stdout.readline() == "again\n"
    process.terminate()
    assert process.wait() == 75


def test_logs_follow_a_run_until_it_has_ended(
    ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ftlib.cli.logs._QUIET_SECONDS", 0.0)
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "1.log"
    path.write_text("the end\n")
    failed = {"event": "failed", "reason": "no data", "time": 1, "job": None}
    make(store, monkeypatch, "a", "1", {"event": "start", "time": 0, "log": str(path), "job": None}, failed)
    code, out, error = ftlib("logs", "a", "-f")
    assert (code, out) == (0, "the end\n") and "a/1: failed: no data" in error


def test_logs_are_those_that_have_been_written(
    ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A submission tells of files that its jobs write when they begin, and an evaluation's may never do."""
    (tmp_path / "logs" / "a").mkdir(parents=True)
    logs = [tmp_path / "logs" / "a" / f"{number}.log" for number in range(3)]
    told = [{"event": "submitted", "time": 0, "log": str(log)} for log in logs]
    run = make(store, monkeypatch, "a", "1", *told[:2])
    code, _, error = ftlib("logs", "a")
    assert code == 2 and "has not started yet" in error
    logs[0].write_text("no such partition\n")
    assert ftlib("logs", "a")[:2] == (0, "no such partition\n")
    process = start_ftlib("logs", "a", "-f")
    assert process.stdout and process.stdout.readline() == "no such partition\n"
    jsonl.append_jsonl(run.history, {**told[2], "host": "n1", "job": None})
    time.sleep(1)  # it looks twice
    logs[2].write_text("again\n")
    assert process.stdout.readline() == "again\n"
    process.terminate()
    assert process.wait() == 75


def test_logs_that_are_not_there(ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(store, monkeypatch, "a", "1", {"event": "start", "time": 0, "log": None})
    code, _, error = ftlib("logs", "a")
    assert code == 2 and "has no log file" in error
    jsonl.append_jsonl(run.history, {"event": "start", "time": time.time(), "log": "/gone", "host": "", "job": None})
    code, _, error = ftlib("logs", "a")
    assert code == 2 and "/gone: the log of" in error
