"""GPUs: what doctor says where they are missing, unseen, broken or old; a stand-in for torch's view of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftlib import doctor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One GPU that works; tests change what torch says of it."""
    seen = SimpleNamespace(count=1, bf16=True, sum=256, error="")

    def ones(number: int, device: str) -> Any:
        if seen.error:
            raise RuntimeError(seen.error)
        return SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: seen.sum))

    properties = SimpleNamespace(name="NVIDIA Made Up", total_memory=80 * 2**30, major=8, minor=6)
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: seen.bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    return seen


def test_one_that_works(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    (found,) = doctor.gpus()
    assert found.state == "NVIDIA Made Up, 80 GiB, CUDA 12.8, with bfloat16" and not found.remedy
    cuda.bf16 = False
    (found,) = doctor.gpus()
    assert "without bfloat16" in found.state and "training.fp16" in found.remedy and not found.fatal


@pytest.mark.parametrize(("change", "state"), [({"sum": 255}, "adds wrongly"), ({"error": "CUDA error: x\ny"}, "x")])
def test_one_that_does_not(cuda: SimpleNamespace, change: dict[str, Any], state: str) -> None:
    vars(cuda).update(change)
    (found,) = doctor.gpus()
    assert found.fatal and found.state.endswith(state)


@pytest.mark.parametrize(
    ("device", "built", "driver", "why"),
    [
        (False, "12.8", "", "--nv"),
        (True, None, "", "built for the CPU only"),
        (True, "12.8", None, "nvidia-smi does not answer"),
        (True, "12.8", "470.82.01\n", "needs driver 525 or newer; this is 470.82.01"),
        (True, "13.0", "575.57\n", "needs driver 580 or newer; this is 575.57"),
        (True, "12.8", "535.54\n", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_one_that_was_promised_and_is_not_seen(
    cuda: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    device: bool,
    built: str | None,
    driver: str | None,
    why: str,
) -> None:
    cuda.count = 0
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: device)
    monkeypatch.setattr(doctor, "program_output", lambda *command: driver)
    (found,) = doctor.gpus()
    assert found.fatal and found.state == "Slurm gave 2, torch sees 0" and why in found.remedy


def test_none_is_no_fault(cuda: SimpleNamespace) -> None:
    cuda.count = 0
    (found,) = doctor.gpus()
    assert found.state == "none here" and not found.remedy
