"""The outcome of a check, and asking programs of the system."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check's outcome; `remedy` is empty when nothing is to be done."""

    check: str
    state: str
    remedy: str = ""
    fatal: bool = False


def ask(*command: str) -> str | None:
    """What a program prints; None if it fails or does not answer within 20 s."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError):
        return None


def inside_container() -> str | None:
    """The image that this process runs in."""
    return os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
