"""GPUs: does torch see those that Slurm gave, suit driver and torch, do they compute, and in bfloat16?"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.diagnosis.finding import Finding, ask
from ftlib.gpu_architectures import REMEDY, misfit

_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""CUDA's major version → the oldest branch of the driver that runs it (NVIDIA, CUDA Compatibility, minor versions)."""


def gpus() -> Iterator[Finding]:
    """All of it, where torch is installed; a login node has no GPU and needs none."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    promised = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    seen = torch.cuda.device_count()
    if promised > seen:
        yield Finding("GPU", f"Slurm gave {promised}, torch sees {seen}", _why_unseen(torch), fatal=True)
    elif not seen:
        yield Finding("GPU", "none was asked for" if "SLURM_JOB_ID" in os.environ else "none here")
    for index in range(seen):
        yield _one(torch, index)


def _why_unseen(torch: Any) -> str:
    """What keeps torch from the GPU."""
    if not Path("/dev/nvidiactl").exists():
        return "No NVIDIA device is in here: start the container with --nv (jobs/run.sh does), on a node with a driver."
    if torch.version.cuda is None:
        return "This torch is built for the CPU only: build the image from one with CUDA (BASE= in jobs/site.env)."
    driver = (ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0].strip()
    needed = _DRIVERS.get(torch.version.cuda.partition(".")[0], 0)
    if not driver:
        return "nvidia-smi does not answer: ask your site whether the node's driver is in order."
    if driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) < needed:
        built = f"torch is built for CUDA {torch.version.cuda}, which needs driver {needed} or newer; this is {driver}."
        return f"{built} Build the image from an older base (BASE= in jobs/site.env)."
    return f"Driver {driver} suits CUDA {torch.version.cuda}: look at CUDA_VISIBLE_DEVICES, and at the site's cgroups."


def _one(torch: Any, index: int) -> Finding:
    """Let it compute; ask for bfloat16 in hardware."""
    check = f"GPU {index}"
    try:
        if fault := misfit(torch, index):
            return Finding(check, fault, REMEDY, fatal=True)
        facts = torch.cuda.get_device_properties(index)
        total = torch.ones(256, device=f"cuda:{index}").sum().item()
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        remedy = "Ask your site about this node; meanwhile: sbatch --exclude=NODE."
        return Finding(check, f"does not compute: {str(error).splitlines()[0]}", remedy, fatal=True)
    state = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if total != 256:
        return Finding(check, f"{state}: adds wrongly", "Ask your site about this node.", fatal=True)
    remedy = "No bfloat16 here: use training.fp16, or training.precision: auto." if not bf16 else ""
    return Finding(check, f"{state}, {'with' if bf16 else 'without'} bfloat16", remedy)
