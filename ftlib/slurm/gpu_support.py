"""Whether the GPU type that a config asks for suits the image's torch and the config's precision, before queueing.

FTLIB_GPU_ARCH in jobs/site.env tells the architecture of each GPU type: `a100=sm_80,v100=sm_70`. The image's label
org.ftlib.architectures tells what its torch is built for. What is not known is not compared.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftlib.config.schema import Config
from ftlib.core.gpu import REMEDY, supports_gpu
from ftlib.errors import UserError

_LABEL = re.compile(r"^org\.ftlib\.architectures:\s*(.+)$", re.MULTILINE)
_BF16_SINCE = 8
"""Major compute capability from which GPUs have bfloat16 in hardware."""


def gpu_capability(settings: Mapping[str, str], gpu_type: str | None) -> tuple[int, int] | None:
    """Return the compute capability of a GPU type by FTLIB_GPU_ARCH; None if it is not in there.

    Raises:
        UserError: FTLIB_GPU_ARCH is not understood.
    """
    known = {}
    for part in filter(None, re.split(r"[,\s]+", settings.get("FTLIB_GPU_ARCH", ""))):
        match = re.fullmatch(r"([^=]+)=sm_(\d+)(\d)", part)
        if not match:
            raise UserError(f"FTLIB_GPU_ARCH: {part}: expected TYPE=sm_NN", "For example FTLIB_GPU_ARCH=a100=sm_80")
        known[match[1]] = (int(match[2]), int(match[3]))
    return known.get(gpu_type or "")


def image_architectures(image: Path) -> list[str]:
    """Return what the image's torch is built for; empty if its labels cannot be read or do not tell."""
    program = shutil.which("apptainer") or shutil.which("singularity")
    if program is None or not image.exists():
        return []
    try:
        command = [program, "inspect", "--labels", str(image)]
        labels = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = _LABEL.search(labels)
    return re.split(r"[,\s]+", found[1].strip()) if found else []


def gpu_fault(config: Config, capability: tuple[int, int], architectures: Sequence[str]) -> tuple[str, str] | None:
    """Return why a config cannot run on a GPU, and what to do; None if it can."""
    name = f"job.gpu_type: {config.job.gpu_type} is sm_{capability[0]}{capability[1]}"
    if architectures and not supports_gpu(architectures, capability):
        return f"{name}, and the image's torch is built for {', '.join(architectures)} only", REMEDY
    if capability[0] < _BF16_SINCE and config.training.get("bf16"):
        remedy = "Set training.precision: auto or training.fp16: true, or ask for an Ampere or newer GPU."
        return f"{name} and has no bfloat16, which training.bf16 asks for", remedy
    return None


def require_gpu_support(config: Config, settings: Mapping[str, str], image: Path) -> None:
    """Refuse a GPU type that cannot run the config.

    Raises:
        UserError: it cannot; or FTLIB_GPU_ARCH is not understood.
    """
    capability = gpu_capability(settings, config.job.gpu_type)
    if config.job.gpus and capability and (fault := gpu_fault(config, capability, image_architectures(image))):
        raise UserError(*fault)
