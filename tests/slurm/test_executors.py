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

from ftlib.config.loader import load_experiment
from ftlib.core import files
from ftlib.core.environment import process_start
from ftlib.core.paths import find_site
from ftlib.runs.run import Run
from ftlib.slurm import executors
from ftlib.slurm.jobspec import JobSpec


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Python: notes its arguments, after the file that it is to run; `bad` fails, `stopped` says 75,
    `slow` too, after a TERM.
    """
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
echo "${{@:2}}" | tee -a '{tmp_path}/asked'
trap 'exit 75' TERM
case $4 in bad) exit 1;; stopped) exit 75;; slow) sleep 60 & wait;; esac
"""
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return tmp_path / "asked"


def test_one_failed_run_hides_no_other(program: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        executors.run_worker([[["one"], ["bad"], ["two"]], [["three"]]])
    assert caught.value.code == 1
    assert program.read_text().splitlines() == ["-m ftlib one", "-m ftlib bad", "-m ftlib three"]
    executors.run_worker([[["four"]]])


def test_a_run_that_was_stopped_or_cancelled_hides_no_other(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(name: str, *events: dict[str, str]) -> list[list[str]]:
        run = Run(tmp_path / name)
        for event in events:
            run.log_event(**event)
        return [["train", str(run.config_file)]]

    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    ours, other = ({"event": "submitted", "executor": "local", "job": job} for job in ("5", "6"))
    cancelled = {"event": "cancelled"}
    tasks = [task("kept", cancelled, ours), task("cancelled", ours, cancelled), task("anew", ours, cancelled, other)]
    tasks += [task("early", cancelled)]
    with pytest.raises(SystemExit) as caught:
        executors.run_worker([[["stopped"]], *tasks])
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
        executors.run_worker([[["slow"]], [["never"]]])
    assert caught.value.code == 75
    assert program.read_text() == "-m ftlib slow\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_comes_last_waits_for_the_lanes(program: Path) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(1.5)
        os._exit(0)
    start = time.monotonic()
    executors.run_worker([[["report"]]], [str(pid)])
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
    plan = executors.Submission(JobSpec.of(config, {}), tasks, [["train"]], ["report", "x"], tmp_path / "logs", [], 1)
    taken: list[tuple[list[int], list[str]]] = []
    executors.submit_locally(plan, lambda numbers, jobs: taken.append((list(numbers), list(jobs))))
    assert sorted(number for numbers, _ in taken for number in numbers) == [0, 1] and taken[-1][0] == []
    processes = [jobs[0] for _, jobs in taken]
    while any(process_start(int(process)) for process in processes):
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "") and len(program.read_text().splitlines()) == len(processes)
    pickled = [pickle.loads((plan.folder / f"{process}_submitted.pkl").read_bytes()).args for process in processes]
    assert [share for _, _, share, _ in pickled] == [*shares, []]
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


HOSTILE = """
import os, pathlib
place = pathlib.Path(os.environ["FTLIB_STORE"]) / "hostile"
place.write_text(f"{__file__} ran\\n")
raise ImportError(f"{__file__}: this module must not be found")
"""
NAMES = ("yaml.py", "numpy.py", "submitit.py", "pydantic.py", "site.py", "signal.py", "runpy.py", "ftlib/__init__.py")


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_modules_where_submit_was_called_are_not_run(
    ftlib: Callable[..., tuple[int, str, str]],
    write_config: Callable[..., Path],
    shared: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: str,
) -> None:
    """Neither submitit's processes nor the commands; relative paths count from there all the same."""
    here = tmp_path / "downloads"
    (here / "ftlib").mkdir(parents=True)
    for name in NAMES:
        (here / name).write_text(HOSTILE)
    (here / "data").symlink_to(shared / "data")
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    settings = ("data.root=data", "training.max_steps=1", "evaluation.before=false")
    code, out, err = ftlib("submit", write_config(base="ftlib/tiny-paligemma"), *settings, "--executor", executor)
    assert code == 0, err
    while executor == "local" and process_start(int(out)):
        time.sleep(0.2)
    logs = "".join(path.read_text() for path in (here / "logs" / "tiny").glob("*_0_log.out"))
    assert not (store / "hostile").exists(), (store / "hostile").read_text()
    assert len(list(store.glob("runs/*/tiny/*/DONE"))) == 1, logs
    assert Path.cwd() == here


def test_gpus_are_those_that_the_lane_was_given(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    executors.run_worker([], (), ["MIG-1", "MIG-2"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-1,MIG-2"
    executors.run_worker([])
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
    monkeypatch.setattr(executors, "_local_workers", lambda spec, gpus: 2)
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
    assert files.is_complete(good[0].evaluation_folder("jsonl", "valid", "after"))
    assert "/nowhere" in logs
    code, out, err = ftlib(*arguments, "--executor", "debug")
    assert code == 1 and "1 finished" in err
