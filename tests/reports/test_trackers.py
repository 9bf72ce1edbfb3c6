"""Numbers for TensorBoard, read back by TensorBoard, and offline runs for Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftlib.core import jsonl
from ftlib.runs.run import Run

Ftlib = Callable[..., tuple[int, str, str]]


def test_tensorboard_reads_every_step_and_score(finished: Run, ftlib: Ftlib) -> None:
    for _ in range(2):  # written anew, not once more
        code, _, err = ftlib("report", "pets", "--tensorboard")
    assert code == 0
    assert f"tensorboard --logdir {finished.folder / 'tensorboard'}" in err
    events = EventAccumulator(str(finished.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(4 / step)) for step in range(1, 31)]
    for name, last in (("seconds", 0.25), ("memory_gib", 3.0)):
        assert events.Scalars(f"train/{name}")[-1].value == last
    (before,), (after,) = (events.Scalars(f"jsonl/valid/{when}/accuracy") for when in ("before", "after"))
    assert (before.step, before.value, after.step, after.value) == (0, 0.5, 30, 0.75)


ASKED = {"step": 10, "attempt": 0, "split": "valid"}
PARTS = {"a": {"value": 0.25, "perplexity": 1.3}, "b": {"value": None, "perplexity": None}}


@pytest.fixture
def asked(finished: Run) -> Run:
    """With answers and losses at two checkpoints."""
    jsonl.append_jsonl(finished.metrics, {**ASKED, "metric": "accuracy", "value": 0.5})
    jsonl.append_jsonl(finished.metrics, {**ASKED, "metric": "loss", "value": 0.75, "perplexity": 2.5, "parts": PARTS})
    jsonl.append_jsonl(finished.metrics, {**ASKED, "step": 20, "metric": "loss", "value": None, "perplexity": None})
    return finished


def test_what_was_asked_in_training_is_there_too(asked: Run, ftlib: Ftlib) -> None:
    code, _, _ = ftlib("report", "pets", "--tensorboard")
    assert code == 0
    events = EventAccumulator(str(asked.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected = {"valid/loss": 0.75, "valid/perplexity": 2.5, "valid/loss/a": 0.25, "valid/accuracy": 0.5}
    for name, value in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(10, value)]
    assert "valid/loss/b" not in events.Tags()["scalars"]
    assert ftlib("report", "pets", "--wandb", "animals")[0] == 0
    content = b"".join(path.read_bytes() for path in (asked.folder / "wandb").rglob("*.wandb"))
    assert all(name.encode() in content for name in expected)


def test_wandb_stays_on_this_machine_and_holds_no_key(
    finished: Run, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted" * 6)
    code, _, err = ftlib("report", "pets", "--wandb", "animals")
    assert code == 0
    (folder,) = (finished.folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in err
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for text in ("animals", "train/loss", "train/memory_gib", "jsonl/valid/after/accuracy", "ftlib/tiny-paligemma"):
        assert text.encode() in content
    assert b"planted" not in content


def test_what_is_missing_is_named(finished: Run, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, out, err = ftlib("report", "pets", "--tensorboard")
    assert (code, Path(out.strip()).name) == (2, "report.html")
    assert "ftlib[trackers]" in err
