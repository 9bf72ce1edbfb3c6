"""The executors of one machine, for real: processes, signals, exit codes."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import files
from ftlib.config_file import load_experiment
from ftlib.runs import Run, process_start
from ftlib.site import find_site
from ftlib.submission import lanes, launch
from ftlib.submission.jobspec import JobSpec


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Python: notes its arguments; `bad` fails, `stopped` says 75, `slow` too, after a TERM."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
echo "$@" | tee -a '{tmp_path}/asked'
trap 'exit 75' TERM
case $3 in bad) exit 1;; stopped) exit 75;; slow) sleep 60 & wait;; esac
"""
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return tmp_path / "asked"


def test_one_failed_run_hides_no_other(program: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        lanes.run_lane([[["one"], ["bad"], ["two"]], [["three"]]])
    assert caught.value.code == 1
    assert program.read_text().splitlines() == ["-m ftlib one", "-m ftlib bad", "-m ftlib three"]
    lanes.run_lane([[["four"]]])


def test_a_run_that_was_stopped_or_cancelled_hides_no_other(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(name: str, *events: dict[str, str]) -> list[list[str]]:
        run = Run(tmp_path / name)
        for event in events:
            run.note(**event)
        return [["train", str(run.config_file)]]

    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    ours, other = ({"event": "submitted", "executor": "local", "job": job} for job in ("5", "6"))
    cancelled = {"event": "cancelled"}
    tasks = [task("kept", cancelled, ours), task("cancelled", ours, cancelled), task("anew", ours, cancelled, other)]
    tasks += [task("early", cancelled)]
    with pytest.raises(SystemExit) as caught:
        lanes.run_lane([[["stopped"]], *tasks])
    assert caught.value.code == 1
    assert [line.split("/")[-2:-1] for line in program.read_text().splitlines()] == [[], ["kept"], ["early"]]


def test_a_lane_hands_its_signal_on_and_ends(program: Path) -> None:
    def interrupt() -> None:
        while not program.exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as caught:
        lanes.run_lane([[["slow"]], [["never"]]])
    assert caught.value.code == 75
    assert program.read_text() == "-m ftlib slow\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_comes_last_waits_for_the_lanes(program: Path) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(1.5)
        os._exit(0)
    start = time.monotonic()
    lanes.run_lane([[["report"]]], [str(pid)])
    assert time.monotonic() - start > 1
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("visible", "gpus", "shares"),
    [
        ("2,3", 1, [["2"], ["3"]]),
        ("GPU-a, GPU-b,GPU-c", 2, [["GPU-a", "GPU-b"]]),
        ("7", 2, [["7"]]),
        ("1,2", 0, [[], []]),
    ],
)
def test_a_machine_is_shared_out_in_silence(
    program: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], visible: str, gpus: int, shares: list[list[str]],
) -> None:  # fmt: skip
    """Who waits for the end of our output does not wait for the runs; GPUs that are not ours are left alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    config = load_experiment(config_file, [f"job.gpus={gpus}", "job.array_parallelism=4"], find_site()).config
    tasks = [[["train", str(number)]] for number in range(2)]
    plan = launch.Plan(JobSpec.of(config, {}), tasks, [["train"]], ["report", "x"], tmp_path / "logs", [], 1)
    taken: list[tuple[list[int], list[str]]] = []
    launch.to_this_machine(plan, lambda numbers, jobs: taken.append((list(numbers), list(jobs))))
    assert sorted(number for numbers, _ in taken for number in numbers) == [0, 1] and taken[-1][0] == []
    processes = [jobs[0] for _, jobs in taken]
    while any(process_start(int(process)) for process in processes):
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "") and len(program.read_text().splitlines()) == len(processes)
    pickled = [pickle.loads((plan.folder / f"{process}_submitted.pkl").read_bytes()).args for process in processes]
    assert [share for _, _, share in pickled] == [*shares, []]
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_gpus_are_those_that_the_lane_was_given(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lanes.run_lane([], (), ["MIG-1", "MIG-2"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-1,MIG-2"
    lanes.run_lane([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-1,MIG-2"


def test_a_sweep_in_the_background_of_this_machine(
    ftlib: Callable[..., tuple[int, str, str]],
    write_config: Callable[..., Path],
    shared: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs, one with a data folder that is not there; submitted again, only the other one is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_lanes_here", lambda spec, gpus: 2)
    config = write_config(base="ftlib/tiny-paligemma")
    sweep = "sweep.data.root=['${store}/data', '/nowhere']"
    store.mkdir()
    (store / "data").symlink_to(shared / "data")
    arguments = ("submit", config, sweep, "training.max_steps=2", "evaluation.before=false")
    code, out, err = ftlib(*arguments, "--executor", "local")
    assert code == 0 and len(out.split()) == 2, err
    code, again, err = ftlib(*arguments, "--executor", "local")
    assert (code, again) == (0, "") and "2 queued or running" in err
    while any(process_start(int(job)) for job in out.split()):
        time.sleep(0.5)
    logs = "".join(path.read_text() for path in (tmp_path / "logs" / "tiny").glob("*_0_log.out"))
    good = [Run(path.parent) for path in store.glob("runs/*/tiny/*/DONE")]
    assert len(good) == 1, logs
    assert files.is_complete(good[0].evaluation("jsonl", "valid", "after"))
    assert "/nowhere" in logs
    code, out, err = ftlib(*arguments, "--executor", "debug")
    assert code == 1 and "1 finished" in err
