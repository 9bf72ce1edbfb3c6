"""Numbers for TensorBoard, read back by TensorBoard, and offline runs for Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftlib.runs import Run

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
