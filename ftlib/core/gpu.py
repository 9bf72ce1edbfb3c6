"""Facts about GPUs: which there are, and whether torch can compute on them. torch is used only where it is imported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.errors import UserError

_BF16_SINCE = (8, 0)
"""The compute capability that has bfloat16 in hardware."""
REMEDY = (
    "Build the image from a base whose torch has it (BASE= in jobs/site.env; for a V100 that is torch for CUDA 12.6), "
    "or ask for another GPU (job.gpu_type, or sbatch --gres)."
)


def gpu_names() -> list[str]:
    """The GPUs that torch sees in this process."""
    cuda = _cuda()
    return [cuda.get_device_name(index) for index in range(cuda.device_count())] if cuda else []


def gpu_name() -> str | None:
    """The GPU of this process; None: it has none."""
    cuda = _cuda()
    return str(cuda.get_device_name()) if cuda else None


def gpu_memory_bytes() -> int | None:
    """Memory of this process's GPU; None: it has none."""
    cuda = _cuda()
    return int(cuda.get_device_properties(cuda.current_device()).total_memory) if cuda else None


def has_bfloat16() -> bool:
    """Whether this process's GPU computes in bfloat16 (Ampere and newer)."""
    cuda = _cuda()
    return bool(cuda and cuda.get_device_capability() >= _BF16_SINCE)


def count_gpus() -> int:
    """GPUs of this job on all its nodes, by Slurm's variables; outside Slurm those that torch sees."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) * int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    return given or len(gpu_names())


def usable_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without it, all of this machine.

    Needs no torch.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


# GPUs that this build of torch has kernels for. Builds for newer CUDA leave old ones out: those for 12.8 lack the V100.
#
# `torch.cuda.get_arch_list()` names what a build has: machine code (`sm_80`), which runs on GPUs of the same major and
# the same or a higher minor compute capability, and PTX (`compute_90`), which the driver compiles for any newer GPU.
# With a suffix (`sm_90a`, `sm_100f`) code runs on that capability only (`a`), or also on later minor ones (`f`).


def supports_gpu(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build of torch has code for a GPU; True for a build that names no CUDA architecture."""
    known = [match for name in architectures if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    return not known or any(_supports(match, capability) for match in known)


def _supports(code: re.Match[str], capability: tuple[int, int]) -> bool:
    kind, own, letter = code[1], (int(code[2]), int(code[3])), code[4]
    if letter == "a":
        return own == capability
    if kind == "compute" and not letter:
        return own <= capability
    return own[0] == capability[0] and own[1] <= capability[1]


def find_mismatch(torch: Any, index: int) -> str | None:
    """Why this build of torch cannot compute on a GPU that it sees; None if it can."""
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if supports_gpu(architectures, capability):
        return None
    name, own = torch.cuda.get_device_name(index), "".join(map(str, capability))
    return f"{name} is sm_{own}, and torch {torch.__version__} here is built for {', '.join(architectures)} only"


def require_kernels(torch: Any, index: int | None) -> None:
    """Refuse a GPU that this build of torch cannot compute on.

    Args:
        index: of the GPU; None: this process computes on the CPU.

    Raises:
        UserError: torch has no code for it.
    """
    if index is not None and (fault := find_mismatch(torch, index)):
        raise UserError(fault, REMEDY)
