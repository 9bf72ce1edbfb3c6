"""cancel and clean: what is asked of Slurm, what goes and what stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftlib.core import files, jsonl, lease
from ftlib.core.environment import host_name, process_start
from ftlib.runs.run import Run
from tests.conftest import read_lines

Ftlib = Callable[..., tuple[int, str, str]]
START = {"event": "start", "time": 5, "job": "7", "host": "n1"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> Path:
    """sacct that prints the file `sacct`, scancel that notes what it was asked, and nobody's jobs in squeue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sacct.txt").write_text("")
    programs = {
        "sacct": f"cat '{folder}/sacct.txt'",
        "squeue": "",
        "scancel": f"echo \"$@\" >> '{folder}/cancelled'; sed -i s/PENDING/CANCELLED/ '{folder}/sacct.txt'",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FTLIB_RUNS", str(store / "runs"))
    return folder


def make(store: Path, name: str, *events: dict[str, object]) -> Run:
    run = Run(store / "runs" / name / "1")
    files.write_text(run.config_file, "")
    for event in events:
        jsonl.append_jsonl(run.history, event)
    return run


def finished(store: Path, name: str) -> Run:
    run = make(store, name, START, {**START, "event": "done"})
    files.write_json(run.done_marker, {"step": 3})
    files.write_text(run.folder / "checkpoints" / "attempt-0" / "checkpoint-3" / "weights", "x" * 3_000_000)
    return run


def test_cancelled_by_name_in_slurm(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    run = make(store, "a", {"event": "submitted", "executor": "slurm", "job": "7_1", "time": 1})
    make(store, "b", {**START, "job": "8"})
    (slurm / "sacct.txt").write_text("7_1|PENDING|0:0|Priority||0\n8|COMPLETED|0:0||n1|9\n")
    code, _, error = ftlib("cancel", "a", "b")
    assert code == 0 and error == "a/1: cancelled job 7_1\n"
    assert (slurm / "cancelled").read_text() == "7_1\n"
    assert read_lines(run.history)[-1]["event"] == "cancelled"
    (record,) = json.loads(ftlib("status", "a", "--json")[1])
    assert record["state"] == "cancelled"
    assert "nothing to cancel" in ftlib("cancel", "a")[2]


def test_a_job_that_has_gone_on_to_something_else_is_left_alone(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    """One that was begun by hand: an allocation, or a script that trains one config after the other."""
    make(store, "a", START, {**START, "event": "done"})
    make(store, "b", START)
    (slurm / "sacct.txt").write_text("7|RUNNING|0:0||n1|9\n")
    assert "nothing to cancel" in ftlib("cancel", "a")[2] and not (slurm / "cancelled").exists()
    assert ftlib("cancel", "b")[2] == "b/1: cancelled job 7\n"


def test_what_is_being_requeued_is_cancelled_again(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    make(store, "a", {"event": "submitted", "executor": "slurm", "job": "7", "time": 1})
    (slurm / "sacct.txt").write_text("7|RUNNING|0:0||n1|5\n")
    text = f"#!/bin/sh\necho \"$@\" >> '{slurm}/cancelled'\n"
    requeue = f"if [ $(wc -l < '{slurm}/cancelled') = 1 ]; then s=PENDING; else s=CANCELLED; fi\n"
    (slurm / "scancel").write_text(text + requeue + f"echo \"7|$s|0:0|||5\" > '{slurm}/sacct.txt'\n")
    assert ftlib("cancel", "a")[0] == 0
    assert (slurm / "cancelled").read_text() == "7\n7\n"


def test_when_scancel_does_not_answer_nothing_is_recorded(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    run = make(store, "a", {"event": "submitted", "executor": "slurm", "job": "7", "time": 1})
    (slurm / "sacct.txt").write_text("7|PENDING|0:0|Priority||0\n")
    (slurm / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Unable to contact slurm controller' >&2; exit 1\n")
    code, _, error = ftlib("cancel", "a")
    assert code == 2 and "Unable to contact slurm controller" in error and "Wait until it responds" in error
    assert "--executor local" not in error and len(read_lines(run.history)) == 1


def test_the_report_is_cancelled_with_the_last_run_that_it_shows(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    report = {"event": "report submitted", "report": "9", "job": None, "time": 1}
    for number in ("1", "2"):
        run = Run(store / "runs" / "a" / number)
        files.write_text(run.config_file, "")
        submitted = {"event": "submitted", "executor": "slurm", "job": f"7_{number}", "time": 1}
        for event in (submitted, report):
            jsonl.append_jsonl(run.history, event)
    rows = "7_1|PENDING|0:0|Priority||0\n7_2|RUNNING|0:0||n1|5\n9|PENDING|0:0|Dependency||0\n"
    (slurm / "sacct.txt").write_text(rows)
    assert ftlib("cancel", "a/1")[0] == 0 and (slurm / "cancelled").read_text() == "7_1\n"
    (slurm / "sacct.txt").write_text(rows.replace("7_1|PENDING", "7_1|CANCELLED"))
    code, _, error = ftlib("cancel", "a/2")
    assert code == 0 and "cancelled job 9, which would report on these runs" in error
    assert (slurm / "cancelled").read_text() == "7_1\n7_2 9\n"


def test_slurm_that_does_not_answer_is_no_cancellation(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    run = make(store, "a", START)
    for name in ("sacct", "squeue"):
        (slurm / name).write_text("#!/bin/sh\nexit 1\n")
        (slurm / name).chmod(0o755)
    code, _, error = ftlib("cancel", "a")
    assert code == 2 and "Slurm cannot cancel" in error
    assert read_lines(run.history)[-1]["event"] == "start"
    assert "Slurm is not available" in ftlib("status")[2]
    assert "cannot check whether runs are queued" in ftlib("clean")[2]


def test_a_process_of_this_machine_is_asked_to_end(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    run = make(store, "a", {**START, "job": None})
    code = "import sys, time; from pathlib import Path; from ftlib.core.lease import acquire_lease\n"
    code += "with acquire_lease(Path(sys.argv[1])):\n print('mine', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, run.folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "mine\n"
    assert "skipped (running)" in ftlib("clean", "--runs", "a", "--yes")[2] and run.folder.exists()
    assert ftlib("cancel", "a")[2] == f"a/1: cancelled process {process.pid}\n"
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_what_waits_for_a_process_of_this_machine_will_not_begin(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    lane = {"executor": "local", "job": str(os.getpid()), "started": process_start(os.getpid())}
    run = make(store, "a", {"event": "submitted", "host": host_name(), "time": 1, **lane})
    assert "skipped (queued)" in ftlib("clean", "--runs", "a", "--yes")[2]
    assert ftlib("cancel", "a")[2] == "a/1: cancelled before its turn\n"
    assert read_lines(run.history)[-1]["event"] == "cancelled"
    (record,) = json.loads(ftlib("status", "a", "--json")[1])
    assert record["state"] == "cancelled"
    assert "nothing to cancel" in ftlib("cancel", "a")[2]


def test_checkpoints_of_finished_runs_go_and_nothing_else(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    done, other = finished(store, "a"), finished(store, "b")
    other.done_marker.unlink()
    torn = done.folder / f"adapter{files.TEMPORARY_PREFIX}n1-1-abc" / "weights"
    files.write_text(torn, "")
    code, output, error = ftlib("clean")
    assert code == 2 and "Add --yes" in error and torn.exists()
    assert [line.split() for line in output.splitlines()[2:]] == [
        ["a/1", "checkpoints", "3.0", "MB"], ["a/1", "leftovers", "0.0", "MB"], ["together", "3.0", "MB"]]  # fmt: skip
    assert ftlib("clean", "--yes")[2] == "3.0 MB freed\n"
    assert sorted(path.name for path in done.folder.iterdir()) == ["DONE", "config.yaml", "history.jsonl"]
    assert (other.folder / "checkpoints" / "attempt-0" / "checkpoint-3" / "weights").exists()
    assert "nothing to free" in ftlib("clean", "--yes")[2]


@pytest.mark.parametrize(("answer", "stays"), [("", True), ("n", True), ("y", False)])
def test_who_is_asked_decides(
    ftlib: Ftlib, slurm: Path, store: Path, monkeypatch: pytest.MonkeyPatch, answer: str, stays: bool
) -> None:
    run = finished(store, "a")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert ftlib("clean")[0] == 0
    assert (run.folder / "checkpoints").exists() is stays


def test_whole_runs_by_name_or_age_never_what_waits(ftlib: Ftlib, slurm: Path, store: Path) -> None:
    old, new = finished(store, "a"), finished(store, "b")
    waiting = make(store, "c", {**START, "job": "9"})
    (slurm / "sacct.txt").write_text("9|PENDING|0:0|Priority||0\n")
    past = time.time() - 40 * 86400
    for path in (old.history, old.config_file, waiting.history, waiting.config_file):
        os.utime(path, (past, past))
    assert ftlib("clean", "--runs", "--yes")[0] == 2
    for days in ("-3", "nan", "inf", "x"):
        assert "must be a number of days" in ftlib("clean", "--runs", "--older-than", days, "--yes")[2]
    assert new.folder.exists()
    error = ftlib("clean", "--runs", "--older-than", "30", "--yes")[2]
    assert "c/1: skipped (queued)" in error
    assert not old.folder.exists() and new.folder.exists() and waiting.folder.exists()


@pytest.mark.parametrize("whole", [(), ("--runs",)])
def test_of_links_only_the_link_goes(
    ftlib: Ftlib, slurm: Path, store: Path, tmp_path: Path, whole: tuple[str, ...]
) -> None:
    run = finished(store, "a")
    (run.folder / "checkpoints").rename(tmp_path / "scratch")
    (run.folder / "checkpoints").symlink_to(tmp_path / "scratch")
    code, _, error = ftlib("clean", "a", *whole, "--yes")
    assert code == 0 and error == "0.0 MB freed\n"
    assert not (run.folder / "checkpoints").is_symlink() and run.folder.exists() is not bool(whole)
    assert (tmp_path / "scratch" / "attempt-0").exists()


def test_who_begins_to_work_meanwhile_keeps_his_run(
    ftlib: Ftlib, slurm: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(store, "a")
    with lease.acquire_lease(run.folder):
        monkeypatch.setattr("ftlib.slurm.status.current_holder", lambda folder, now: None)  # looked just before
        assert "skipped: " in ftlib("clean", "--yes")[2]
    assert (run.folder / "checkpoints").exists()


def test_the_code_of_ended_jobs_goes(ftlib: Ftlib, slurm: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, past = store / "runs" / ".jobs", time.time() - 3 * 86400
    for name in ("code-old/ftlib/a.py", "code-new/ftlib/a.py", "17/config.yaml"):
        files.write_text(jobs / name, "x")
    files.write_text(jobs / "image", "x")
    (jobs / "17" / "code").symlink_to(jobs / "code-old")
    for name in ("code-old", "17", "image"):
        os.utime(jobs / name, (past, past))
    (slurm / "squeue").write_text("#!/bin/sh\necho '18|RUNNING|None|n1|0:10|a|p|normal|x'\n")
    code, _, error = ftlib("clean", "--yes")
    assert code == 0 and "is kept while you have jobs" in error and (jobs / "code-old").exists()
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert "is kept: squeue" in ftlib("clean", "--yes")[2] and (jobs / "code-old").exists()
    (slurm / "squeue").write_text("#!/bin/sh\n")
    assert ftlib("clean", "--yes", "--older-than", "30")[2] == "nothing to free\n"
    code, output, _ = ftlib("clean", "--yes")
    assert code == 0 and "code of ended jobs" in output
    assert sorted(path.name for path in jobs.iterdir()) == ["code-new", "image"]
