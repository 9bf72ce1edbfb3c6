"""A training that the storage has no room for is refused before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftlib.core import files
from ftlib.runs import run as runs
from ftlib.training.checkpoints import checkpoint_bytes


def test_bytes_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 5, bias=False).bfloat16())
    model[0].requires_grad_(False)
    assert checkpoint_bytes(model, "adamw_torch", False, 3) == 3 * 3 * 100 + 100
    assert checkpoint_bytes(model, "sgd", True, 3) == 3 * 100 + 500
    assert checkpoint_bytes(model, "adamw_8bit", False, 0) == 100
    model.float().requires_grad_(True)
    assert checkpoint_bytes(model, "adamw_torch", True, 2, torch.bfloat16) == 2 * 3 * 600 + 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_estimate_is_what_is_written(
    ftlib: Callable[..., tuple[int, str, str]], store: Path, write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, dtype: str,
) -> None:  # fmt: skip
    asked: list[int] = []
    monkeypatch.setattr("ftlib.core.files.require_space", lambda folder, size: asked.append(size))
    config = write_config(replace=("family: paligemma", f"family: paligemma, dtype: {dtype}"))
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config)[0] == 0
    (folder,) = store.glob("runs/*/tiny/*")
    run = runs.Run(folder)
    sizes = [sum(entry["bytes"] for entry in files.read_json(path / files.COMPLETE_MARKER).values())
             for _, path in runs.list_checkpoints(run.checkpoint_root())]  # fmt: skip
    written = 3 * sizes[0] + (run.folder / "model" / "model.safetensors").stat().st_size
    assert len(sizes) == 2 and 0.9 * written < asked[0] <= written


def test_no_room(
    ftlib: Callable[..., tuple[int, str, str]], store: Path, write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = write_config()
    assert ftlib("prepare", config)[0] == 0
    monkeypatch.setattr("ftlib.core.files._can_reserve", lambda place, size: False)
    code, _, error = ftlib("train", config)
    assert code == 2 and "are needed and a quota leaves less" in error
    assert not list(store.glob("runs/*/tiny/*/metrics.jsonl"))
