"""Facts about this process: host, Slurm job, package versions, git revision. torch is not imported here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

from ftlib.core.gpu import gpu_names
from ftlib.core.paths import REPOSITORY

PACKAGES = ("ftlib", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pillow")


NUMERIC_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose version can change the result of a training step."""


def version_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two records in `NUMERIC_PACKAGES`, such as "torch 2.11.0 → 2.13.0"; "" for none."""
    pairs = [(name, before["packages"].get(name), now["packages"].get(name)) for name in NUMERIC_PACKAGES]
    return ", ".join(f"{name} {old or 'none'} → {new or 'none'}" for name, old, new in pairs if old != new)


def describe_environment() -> dict[str, Any]:
    """A record for environment.json. It contains no environment variables and so no secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": host_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpu_names(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "code": _git_revision(),
    }


def prefer_expandable_segments() -> None:
    """Set `expandable_segments:True` for torch's CUDA allocator, which avoids fragmentation by batches of many lengths.

    A setting of the user is kept. It must be called before torch first allocates on a GPU.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if (version := package_version("torch")) and not any(name in os.environ for name in names):
        major, minor = version.split(".")[:2]
        name = names[0] if (int(major), int(minor)) >= (2, 10) else names[1]  # the second is deprecated since
        os.environ[name] = "expandable_segments:True"


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The git revision of the code, with "+changes" if files differ from it; None without git."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def host_name() -> str:
    """The name of this host: Slurm's node name in a job, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str | None:
    """The id of this Slurm job, the same after a requeue; of an array task such as 12_3. None outside Slurm."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def process_start(pid: int) -> str | None:
    """The start time of a process on this host, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
