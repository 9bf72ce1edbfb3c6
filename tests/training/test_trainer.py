"""What the trainer tells of a step beside what the Trainer itself knows."""

from __future__ import annotations

import pytest
import torch

from ftlib.training.trainer import _gpu_memory


def test_memory_is_that_of_a_gpu_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 << 29)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _gpu_memory() == {"memory_gib": 1.5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _gpu_memory() == {}
