"""The executors of one machine, for real: processes, signals, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import files
from ftlib.runs import Run, process_start
from ftlib.submission import launch


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Python: notes its arguments; `bad` fails, `slow` waits for TERM and says 75."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
echo "$@" >> '{tmp_path}/asked'
trap 'exit 75' TERM
case $3 in bad) exit 1;; slow) sleep 60 & wait;; esac
"""
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return tmp_path / "asked"


def test_one_failed_run_hides_no_other(program: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.run_lane([[["one"], ["bad"], ["two"]], [["three"]]])
    assert caught.value.code == 1
    assert program.read_text().splitlines() == ["-m ftlib one", "-m ftlib bad", "-m ftlib three"]
    launch.run_lane([[["four"]]])


def test_a_lane_hands_its_signal_on_and_ends(program: Path) -> None:
    def interrupt() -> None:
        while not program.exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as caught:
        launch.run_lane([[["slow"]], [["never"]]])
    assert caught.value.code == 75
    assert program.read_text() == "-m ftlib slow\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_comes_last_waits_for_the_lanes(program: Path) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(1.5)
        os._exit(0)
    start = time.monotonic()
    launch.run_lane([[["report"]]], [str(pid)])
    assert time.monotonic() - start > 1
    os.waitpid(pid, 0)


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
    monkeypatch.setattr(launch, "_lanes_here", lambda spec: 2)
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
