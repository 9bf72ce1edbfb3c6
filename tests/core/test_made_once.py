"""A base model is asked once for all runs that ask the same."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import files, lease
from ftlib.core.lease import compute_once
from ftlib.evaluation import inference
from tests.conftest import read_lines

HOLD = "import sys, time; from pathlib import Path; from ftlib.core.lease import acquire_lease\n"
HOLD += "with acquire_lease(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)


def hold(place: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that is at work in a place."""
    place.mkdir(parents=True, exist_ok=True)
    other = subprocess.Popen([sys.executable, "-c", HOLD, place, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    return other


def test_what_is_there_is_taken_and_what_is_not_is_made(tmp_path: Path) -> None:
    made: list[int] = []
    assert compute_once(tmp_path, lambda: 5, lambda: made.append(1) or 6, "x") == 5 and not made
    assert compute_once(tmp_path, lambda: None, lambda: made.append(1) or 6, "x") == 6 and made == [1]
    assert not (tmp_path / "owner.json").exists()


def test_while_another_makes_it_we_wait(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    other = hold(tmp_path, 60)
    result = tmp_path / "result"
    threading.Timer(1.0, result.write_text, ["theirs"]).start()
    look = lambda: result.read_text() if result.exists() else None  # noqa: E731
    found = compute_once(tmp_path, look, lambda: pytest.fail("made twice"), "base on valid")
    assert found == "theirs"
    assert capsys.readouterr().err.count("base on valid: in progress in another process; waiting") == 1
    other.kill()
    other.wait()


def test_when_the_other_dies_we_go_on(tmp_path: Path, quick: None) -> None:
    other = hold(tmp_path, 60)
    threading.Timer(1.0, other.kill).start()
    start = time.monotonic()
    reaper = threading.Thread(target=other.wait)
    reaper.start()
    assert compute_once(tmp_path, lambda: None, lambda: "ours", "x") == "ours"
    assert time.monotonic() - start >= 1
    reaper.join()


def test_tasks_of_one_job_make_it_together(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task waits until its own job has the place, then takes its share."""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    foreign = hold(tmp_path, 60)
    monkeypatch.setenv("SLURM_PROCID", "1")
    owner = tmp_path / "owner.json"
    note = files.read_json(owner)
    files.write_json(owner, {**note, "job": "8"})
    threading.Timer(1.0, files.write_json, [owner, {**note, "job": "9"}]).start()
    start = time.monotonic()
    assert compute_once(tmp_path, lambda: None, lambda: "share", "x") == "share"
    assert time.monotonic() - start >= 1
    foreign.kill()
    foreign.wait()


def test_runs_that_differ_in_training_only_share_their_base_models_scores(
    ftlib: Callable[..., tuple[int, str, str]],
    write_config: Callable[..., Path],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    ask = inference.generate_predictions
    monkeypatch.setattr(
        inference, "generate_predictions", lambda *arguments: asked.append(arguments[-1]) or ask(*arguments)
    )
    config = write_config()
    assert ftlib("prepare", config)[0] == 0
    for seed in (1, 2):
        assert ftlib("evaluate", config, f"seed={seed}", "training.learning_rate=1e-3", "--before")[0] == 0
    assert len(asked) == 1
    one, two = store.glob("runs/*/tiny/*/eval/jsonl/valid/before")
    assert files.is_complete(one, thorough=True) and files.is_complete(two, thorough=True)
    assert read_lines(one / "predictions.jsonl") == read_lines(two / "predictions.jsonl")
    assert ftlib("evaluate", config, "data.prompt=what? {prefix}", "--before")[0] == 0
    assert len(asked) == 2, "another prompt is another question"
    assert ftlib("evaluate", config, "seed=1", "training.learning_rate=1e-3", "--before")[0] == 0
    assert len(asked) == 2
    assert ftlib("evaluate", config, "model.dtype=bfloat16", "--before")[0] == 0
    assert len(asked) == 3, "in another type of numbers it is another model"
