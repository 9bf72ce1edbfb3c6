"""Which GPUs a build of torch computes on, by the names of its kernels; whoever loads a model is told before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftlib import doctor
from ftlib.core import gpu
from ftlib.core.gpu import find_mismatch, require_kernels, supports_gpu
from ftlib.errors import UserError
from ftlib.models import loading
from ftlib.models.loading import load_weights
from ftlib.training import train

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
    assert supports_gpu(architectures, capability) is suits


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch for CUDA 12.8 that sees a V100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_128)
    for module in (loading, train):
        monkeypatch.setattr(module, "device", lambda: torch.device("cuda", 0))
    return SimpleNamespace(words="Tesla V100 is sm_70, and torch .* is built for sm_75, sm_80, .* only")


def test_both_are_named_and_what_to_do(v100: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"{v100.words}\n.*CUDA 12\.6.*job\.gpu_type"):
        require_kernels(torch, 0)
    require_kernels(torch, None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_126)
    assert find_mismatch(torch, 0) is None


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
    (found,) = doctor.gpus()
    assert found.fatal and "sm_70" in found.state and "BASE=" in found.remedy


def pretend(monkeypatch: pytest.MonkeyPatch, names: list[str], capability: tuple[int, int] = (8, 0)) -> None:
    """torch with these GPUs, of which the last one is this process's."""
    cuda = SimpleNamespace(
        is_available=lambda: bool(names),
        device_count=lambda: len(names),
        current_device=lambda: len(names) - 1,
        get_device_name=lambda index=-1: names[index],
        get_device_capability=lambda: capability,
        get_device_properties=lambda index: SimpleNamespace(total_memory=(index + 1) << 30),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_NUM_NODES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_facts_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ["A100", "T4"], (7, 5))
    assert gpu.gpu_names() == ["A100", "T4"] and gpu.gpu_name() == "T4" and gpu.count_gpus() == 2
    assert gpu.gpu_memory_bytes() == 2 << 30 and not gpu.has_bfloat16()
    pretend(monkeypatch, ["L4"], (8, 9))
    assert gpu.has_bfloat16()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert gpu.count_gpus() == 8, "all of the job, not those of this task"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-ab,")
    assert gpu.usable_gpus() == ["1", "GPU-ab"]


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, torch_is_there: bool) -> None:
    pretend(monkeypatch, [])
    if not torch_is_there:
        monkeypatch.delitem(sys.modules, "torch")
    assert (gpu.gpu_names(), gpu.gpu_name(), gpu.gpu_memory_bytes()) == ([], None, None)
    assert gpu.count_gpus() == 0 and not gpu.has_bfloat16()
    assert torch_is_there == ("torch" in sys.modules), "nothing here imports torch"
