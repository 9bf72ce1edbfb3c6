"""The host script learns how long the start-up and a step take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from ftlib.config.schema import Checkpoint
from ftlib.training.checkpoints import CheckpointCallback


def test_the_pace_of_training_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 1, 2, 4 and so on: when the first one began, and the seconds of a step so far, rounded up."""
    monkeypatch.setenv("FTLIB_JOB_TMP", str(tmp_path))
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    callback, args = CheckpointCallback(Checkpoint()), TrainingArguments(output_dir=str(tmp_path / "out"))
    state, control = TrainerState(max_steps=100), TrainerControl()
    noted = []
    for seconds in (60, 2, 2, 2, 2):
        callback.on_step_begin(args, state, control)
        clock[0] += seconds
        callback.on_step_end(args, state, control)
        noted.append((tmp_path / "pace").read_text())
    assert noted == ["1000 60\n", "1000 31\n", "1000 31\n", "1000 17\n", "1000 17\n"]
