"""What a run was made with: versions, host, job, code. No torch is imported here unless it already is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from typing import Any

from ftlib.site import REPOSITORY

PACKAGES = ("ftlib", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pillow")


COMPUTING = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose version may change what a step computes."""


def other_versions(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Of two records, the packages that compute and whose version differs, such as "torch 2.11.0 → 2.13.0"; or ""."""
    pairs = [(name, before["packages"].get(name), now["packages"].get(name)) for name in COMPUTING]
    return ", ".join(f"{name} {old or 'none'} → {new or 'none'}" for name, old, new in pairs if old != new)


def describe_environment() -> dict[str, Any]:
    """A record of this process's surroundings; holds no environment variables, so no secret."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "code": _revision(),
    }


def prefer_expandable_segments() -> None:
    """Have torch's allocator grow its blocks of GPU memory, so that batches of many lengths leave no gaps that no
    tensor fits into; what the user set stays. Works until torch allocates on a GPU for the first time.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if (version := _version("torch")) and not any(name in os.environ for name in names):
        major, minor = version.split(".")[:2]
        name = names[0] if (int(major), int(minor)) >= (2, 10) else names[1]  # the second is deprecated since
        os.environ[name] = "expandable_segments:True"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _revision() -> str | None:
    """The git revision of the code, with "+changes" if files differ from it; None without git."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
