"""Which GPUs a build of torch computes on, by the names of its kernels; whoever loads a model is told before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftlib.diagnosis import gpu
from ftlib.errors import UserError
from ftlib.gpu_architectures import misfit, require_kernels, runs_on
from ftlib.models.loading import load_weights

CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("architectures", "capability", "suits"),
    [
        (CUDA_126, (7, 0), True),
        (CUDA_128, (7, 0), False),  # V100
        (CUDA_128, (7, 5), True),  # T4
        (CUDA_128, (8, 9), True),  # L4: code for 8.6 runs on 8.9
        (CUDA_128, (9, 0), True),
        (CUDA_126, (10, 0), False),  # code for 9.0 does not run on 10.0
        (CUDA_128, (12, 1), True),
        (CUDA_128, (13, 0), True),  # by compute_120
        (["sm_70", "compute_70"], (10, 0), True),
        (["compute_90"], (8, 6), False),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a", "compute_90a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["gfx90a"], (9, 0), True),
        ([], (9, 0), True),
    ],
)
def test_code_of_the_same_major_version_and_ptx_of_older_ones_run(
    architectures: list[str], capability: tuple[int, int], suits: bool
) -> None:
    assert runs_on(architectures, capability) is suits


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch for CUDA 12.8 that sees a V100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_128)
    monkeypatch.setattr("ftlib.models.loading.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("ftlib.training.fit.device", lambda: torch.device("cuda", 0))
    return SimpleNamespace(words="Tesla V100 is sm_70, and torch .* is built for sm_75, sm_80, .* only")


def test_both_are_named_and_what_to_do(v100: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"{v100.words}\n.*CUDA 12\.6.*job\.gpu_type"):
        require_kernels(torch, 0)
    require_kernels(torch, None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_126)
    assert misfit(torch, 0) is None


def test_a_model_is_not_loaded(v100: SimpleNamespace, shared: Path) -> None:
    with pytest.raises(UserError, match=v100.words):
        load_weights(shared / "model", "float32")


def test_training_ends_before_it_looks_at_the_data(
    v100: SimpleNamespace,
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, error = ftlib("train", write_config())
    assert code == 2 and "Tesla V100 is sm_70" in error and "prepare" not in error


def test_doctor_says_it(v100: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    (found,) = gpu.gpus()
    assert found.fatal and "sm_70" in found.state and "BASE=" in found.remedy
