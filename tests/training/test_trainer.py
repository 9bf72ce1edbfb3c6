"""What the trainer does otherwise than the Trainer: what it tells of a step, and which weights decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlib.training.checkpoints import keep_optimizer_paged
from ftlib.training.trainer import _gpu_memory
from tests.conftest import FULL, LORA
from tests.training.test_resume import run_of

STRONG = ("training.max_steps=2", "training.learning_rate=1e-3", "training.warmup_steps=0",
          "training.lr_scheduler_type=constant", "training.weight_decay=100")  # fmt: skip
"""A tenth of a weight each step, while Adam moves it by 1/1,000."""


def test_embeddings_and_dora_magnitudes_do_not_decay(
    store: Path, write_config: Callable[..., Path], shared: Path, tmp_path: Path,
    ftlib: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    before = load_file(shared / "model" / "model.safetensors")
    after = {}
    for adapter, result in ((FULL, "model/model"), (LORA.replace("lora", "dora"), "adapter/adapter_model")):
        config = write_config(adapter)
        run = run_of(config, tmp_path / "runs", *STRONG)
        assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, *STRONG)[0] == 0
        after |= load_file(run.folder / f"{result}.safetensors")

    def change(ending: str, length: torch.Tensor) -> float:
        (name,) = (name for name in after if name.endswith(ending))
        return float(after[name].norm() / length.norm())

    table, layer = "embed_tokens.weight", "layers.0.mlp.gate_proj"
    tables = next(tensor for name, tensor in before.items() if name.endswith(table))
    weight = next(tensor for name, tensor in before.items() if name.endswith(f"{layer}.weight"))
    assert change(table, tables) == pytest.approx(1, abs=0.02)
    assert change(f"{layer}.lora_magnitude_vector", weight.norm(dim=1)) == pytest.approx(1, abs=0.02)
    assert change(f"{layer}.weight", weight) == pytest.approx(0.9**2, abs=0.02)


def test_the_state_of_a_paged_optimizer_is_paged_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes makes it, which needs a GPU: here a buffer only says so. Small states are not paged."""
    optim = pytest.importorskip("bitsandbytes").optim

    def buffer(self: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = torch.zeros_like(parameter, dtype=dtype)
        made.is_paged = parameter.numel() >= 1e5
        return made

    weights = [torch.nn.Parameter(torch.ones(400, 300)), torch.nn.Parameter(torch.ones(3, 3))]

    def made(kind: type) -> torch.optim.Optimizer:
        return kind(weights, lr=0.1)

    for kind in (optim.PagedAdamW8bit, optim.PagedAdamW32bit, optim.PagedLion, optim.AdamW8bit):
        first, second = made(kind), made(kind)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        first.step()
        with monkeypatch.context() as patch, keep_optimizer_paged(SimpleNamespace(optimizer=second)):
            patch.setattr("bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer", buffer)
            second.load_state_dict(first.state_dict())
        assert "load_state_dict" not in vars(second)
        for number, weight in enumerate(weights):
            ours, theirs = second.state[weight], first.state[weight]
            assert set(ours) == set(theirs) and all(
                torch.equal(*map(torch.as_tensor, (ours[n], theirs[n]))) for n in ours
            )
            states = [ours[name] for name in ("state1", "state2") if name in ours]
            paged = [getattr(state, "is_paged", False) for state in states]
            assert paged == [number == 0 and "Paged" in kind.__name__] * len(states)


def test_memory_is_that_of_a_gpu_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 << 29)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _gpu_memory() == {"memory_gib": 1.5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _gpu_memory() == {}
