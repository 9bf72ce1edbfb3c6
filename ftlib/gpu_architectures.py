"""Which GPUs a build of torch has kernels for. Builds for newer CUDA leave old ones out: those for 12.8 lack the V100.

`torch.cuda.get_arch_list()` names what a build holds: machine code (`sm_80`), which runs on GPUs of the same major and
the same or a higher minor compute capability, and PTX (`compute_90`), which the driver compiles for any newer GPU. With
a letter behind it (`sm_90a`, `sm_100f`) code runs on that very capability (`a`), or also on later minor ones (`f`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ftlib.errors import UserError

REMEDY = (
    "Build the image from a base whose torch has it (BASE= in jobs/site.env; for a V100 that is torch for CUDA 12.6), "
    "or ask for another GPU (job.gpu_type, or sbatch --gres)."
)


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build of torch has code for a GPU; of a build that names no CUDA architecture nothing is known."""
    known = [match for name in architectures if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    return not known or any(_runs(match, capability) for match in known)


def _runs(code: re.Match[str], capability: tuple[int, int]) -> bool:
    kind, own, letter = code[1], (int(code[2]), int(code[3])), code[4]
    if letter == "a":
        return own == capability
    if kind == "compute" and not letter:
        return own <= capability
    return own[0] == capability[0] and own[1] <= capability[1]


def misfit(torch: Any, index: int) -> str | None:
    """In words why this build of torch cannot compute on a GPU that it sees; None: it can."""
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if runs_on(architectures, capability):
        return None
    name, own = torch.cuda.get_device_name(index), "".join(map(str, capability))
    return f"{name} is sm_{own}, and torch {torch.__version__} here is built for {', '.join(architectures)} only"


def require_kernels(torch: Any, index: int | None) -> None:
    """
    Args:
        index: of the GPU; None: this process computes on the CPU.

    Raises:
        UserError: this build of torch cannot compute on it.
    """
    if index is not None and (fault := misfit(torch, index)):
        raise UserError(fault, REMEDY)
