"""Out of memory in every form that libraries give it, in loading, training, evaluation and merging."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftlib.core.out_of_memory import is_out_of_memory, oom_as_user_error
from ftlib.errors import UserError
from ftlib.models.loading import load_weights
from tests.conftest import LORA

Ftlib = Callable[..., tuple[int, str, str]]

DRIVER = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/… for more "
    "information.\nCUDA kernel errors might be asynchronously reported at some other API call."
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)
LITTLE_ROOM = "Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"


class AcceleratorError(RuntimeError):
    """As torch names it since 2.8."""


ON_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError(),
    AcceleratorError(DRIVER),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError(NCCL),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"),
]
ON_HOST = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"
    ),
    RuntimeError("unable to mmap 6291456 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError(f"{LITTLE_ROOM}numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
]
OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("memory"),
    UserError("out of GPU memory: told already"),
]


@pytest.mark.parametrize("error", ON_GPU, ids=str)
def test_of_the_gpu(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(UserError, match=r"^out of GPU memory") as told, oom_as_user_error("Take less."):
        raise error
    assert told.value.remedy == "Take less."


@pytest.mark.parametrize("error", ON_HOST, ids=str)
def test_of_the_host(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(UserError, match=r"^out of memory") as told, oom_as_user_error("Take less."):
        raise error
    assert "job.mem" in told.value.remedy


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_everything_else_stays_what_it_is(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as kept, oom_as_user_error("Take less."):
        raise error
    assert kept.value is error


@pytest.mark.parametrize(
    "words",
    [
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "cuFFT error: CUFFT_INTERNAL_ERROR",
    ],
)
def test_an_internal_error_counts_where_the_gpu_is_full(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """What an H200 said whose memory was taken up to the last MiB."""
    error, total = RuntimeError(words), 80 << 30
    assert not is_out_of_memory(error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, counts in ((64 << 20, True), (4 << 30, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, total))
        assert is_out_of_memory(error) == counts
    monkeypatch.setattr(torch.cuda, "mem_get_info", raising(RuntimeError("CUDA error: device-side assert triggered")))
    assert not is_out_of_memory(error)


def test_the_real_ones() -> None:
    for ask in (lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**15)):
        with pytest.raises(UserError, match="out of memory"), oom_as_user_error():
            ask()


def test_the_line_that_says_so_is_told_also_of_a_cause() -> None:
    with pytest.raises(UserError) as told, oom_as_user_error(doing="with a step"):
        raise ValueError("the weights cannot be placed") from RuntimeError(NCCL)
    assert told.value.problem == "out of GPU memory with a step: Cuda failure 2 'out of memory'"


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


CUBLAS, HOST = ON_GPU[3], ON_HOST[2]


@pytest.mark.parametrize("error", [CUBLAS, HOST, ON_GPU[2], ON_HOST[0]], ids=str)
def test_loading(shared: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Before, it was taken for a damaged model, or ended in a traceback."""
    from transformers import PaliGemmaForConditionalGeneration

    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "from_pretrained", raising(error))
    with pytest.raises(UserError, match=r"^out of (GPU )?memory"):
        load_weights(shared / "model", "float32")


@pytest.mark.parametrize(("error", "told"), [(ON_GPU[0], "^out of GPU memory"), (ValueError("odd"), "loaded: .*: odd")])
def test_quantizing(shared: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    """transformers collects what fails in it and raises another error that does not say what."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert", raising(error))
    with pytest.raises(UserError, match=told):
        load_weights(shared / "model", "bfloat16", quantization="nf4")


def test_commands(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(LORA, replace=("max_steps: 12", "max_steps: 2"))
    assert ftlib("prepare", config)[0] == 0
    with monkeypatch.context() as context:
        context.setattr("ftlib.training.trainer.answer_loss", raising(HOST))
        code, _, error = ftlib("train", config)
    assert code == 2 and "out of memory: [enforce fail" in error and "job.mem" in error and "Traceback" not in error
    assert ftlib("train", config)[0] == 0
    monkeypatch.setattr("ftlib.models.generation.generate_with_logprobs", raising(CUBLAS))
    for words in (("evaluate", config), ("predict", "tiny", "--prompt", "which?", "--image", image_in(config))):
        code, _, error = ftlib(*words)
        assert code == 2 and "out of GPU memory with a batch of " in error and "CUBLAS_STATUS_ALLOC_FAILED" in error
        assert "evaluation.batch_size" in error and "Traceback" not in error


def image_in(config: Path) -> str:
    import yaml

    root = Path(yaml.safe_load(config.read_text())["data"]["root"])
    return str(next(root.rglob("*.png")))


MERGES_WITH_LITTLE = """
import os, resource, sys, torch
from ftlib.cli.main import main
import ftlib.merging.merge
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one thread
resource.setrlimit(resource.RLIMIT_AS, (int(open("/proc/self/statm").read().split()[0]) * 4096 + (200 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_merging_in_too_little_memory(tmp_path: Path) -> None:
    from tests.merging import bare

    for name in ("base", "a", "b"):  # a row is the least that is read at once
        bare.save(tmp_path / name, {"model.embed_tokens.weight": torch.ones(2, 8_000_000).half()})
    words = ["--base", "base", "--model", "a", "b", "--method", "ties", "-o", "merged"]
    command = [sys.executable, "-c", MERGES_WITH_LITTLE, "merge", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "out of memory" in done.stderr, done.stderr
    assert "fewer cores" in done.stderr and "Traceback" not in done.stderr
