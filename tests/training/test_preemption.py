"""Signals: saved at the step boundary, exit 75, and the same result in the end; handlers stand before heavy imports."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import jsonl
from ftlib.runs import run as runs
from tests.conftest import FULL, start_ftlib
from tests.training.test_resume import outcome, run_of


@pytest.fixture
def config(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setenv("FTLIB_RUNS", "")
    path = write_config(FULL, replace=("max_steps: 12", "max_steps: 60"))
    path.write_text(path.read_text().replace("steps: 3", "steps: 1000"))
    assert ftlib("prepare", path)[0] == 0
    return path


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_saves_at_the_step_boundary_and_the_result_is_the_same(
    config: Path, tmp_path: Path, name: str, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    stopped = run_of(config, tmp_path / "stopped")
    for wanted in (random.randint(2, 15), random.randint(20, 45)):
        process = start_ftlib("train", config)
        while process.poll() is None and len(jsonl.read_jsonl_log(stopped.metrics)) < wanted:
            time.sleep(0.002)
        for _ in range(3):  # Slurm and Apptainer may deliver it more than once
            process.send_signal(signal.Signals[name])
            time.sleep(0.01)
        _, error = process.communicate()
        assert process.returncode == 75, error
        assert f"ended by {name}; run the same command again to resume" in error and "Traceback" not in error
        step = jsonl.read_jsonl_log(stopped.metrics)[-1]["step"]
        checkpoint = runs.last_checkpoint(stopped.checkpoint_root())
        assert checkpoint is not None and checkpoint[0] == step
        last = jsonl.read_jsonl_log(stopped.history)[-1]
        assert (last["event"], last["signal"]) == ("preempted", name)
    assert start_ftlib("train", config).wait() == 0
    assert outcome(stopped) == outcome(straight)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_workers_that_get_the_signal_too_do_not_fail_the_run(config: Path, tmp_path: Path, name: str) -> None:
    run = run_of(config, tmp_path / "workers")
    config.write_text(config.read_text().replace("warmup_steps: 2", "warmup_steps: 2\n  dataloader_num_workers: 2"))
    process = start_ftlib("train", config)
    while process.poll() is None and len(jsonl.read_jsonl_log(run.metrics)) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, signal.Signals[name])
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert runs.last_checkpoint(run.checkpoint_root()) is not None


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 2.5])
def test_a_signal_during_the_start_ends_at_once_with_75(config: Path, tmp_path: Path, delay: float) -> None:
    run = run_of(config, tmp_path / "early")
    notes = tmp_path / "notes"
    notes.mkdir()
    process = start_ftlib("train", config, FTLIB_JOB_TMP=str(notes))
    while not (notes / "ready").exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "Traceback" not in error
    assert (notes / "signal").read_text() == "SIGUSR1"
    assert not (run.folder / "owner.json").exists()


def test_notes_for_the_host_script(
    config: Path, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(config, tmp_path / "noted")
    monkeypatch.setenv("FTLIB_JOB_TMP", str(tmp_path))
    assert ftlib("train", config)[0] == 0
    assert (tmp_path / "run").read_text() == str(run.folder)
    assert (tmp_path / "checkpointed").exists()
    assert not (tmp_path / "signal").exists()
