"""The GPU that is checked, or the CPU on which the checks are rehearsed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

REHEARSAL = os.environ.get("FTLIB_GPU_REHEARSAL") == "cpu"
"""Whether tiny shapes run on the CPU."""

DEVICE = "cpu" if REHEARSAL else "cuda"

DENSE_BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}
"""Part of a GPU's name → FLOP/s of dense bf16 (V100: fp16) matrix products, by the vendor's data sheets (SXM parts)."""


def data_sheet_peak() -> float | None:
    """What MFU is divided by; None: this GPU's is not known here."""
    name = "" if REHEARSAL else torch.cuda.get_device_name()
    return next((peak for part, peak in DENSE_BF16_PEAK.items() if part in name), None)


def synchronize() -> None:
    """Wait for the GPU."""
    if not REHEARSAL:
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Give cached memory back and begin to look for the peak anew."""
    if not REHEARSAL:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_reserved() -> int:
    """Bytes that torch has reserved at most since `reset_peak`; 0 in a rehearsal."""
    return 0 if REHEARSAL else torch.cuda.max_memory_reserved()


def peak_allocated() -> int:
    """Bytes of tensors at most since `reset_peak`; 0 in a rehearsal."""
    return 0 if REHEARSAL else torch.cuda.max_memory_allocated()


def seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Of one call, on average."""
    for _ in range(warm_up):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def matmul_rate() -> float:
    """FLOP/s of a bf16 matrix product of 8,192 × 8,192 random numbers."""
    size = 256 if REHEARSAL else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, 20, 3)


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**20 if REHEARSAL else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 10, 2)
