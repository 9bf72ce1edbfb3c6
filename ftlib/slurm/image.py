"""The container image as the login node sees it: its labels, written by containers/build.sh and ftlib.def."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "org.ftlib."


@dataclass(frozen=True)
class ImageLabels:
    """What an image was built from. Images of older versions have only `revision` and `base`; the rest is empty.

    Attributes:
        revision: of ftlib, by git.
        base: the base image, as a registry names it.
        base_digest: of the base image, as `sha256:…`; `unknown` if the registry did not tell it.
        lock: file and hash of the lock that packages were installed by.
        architectures: what torch has code for, such as `sm_80`; `none` for a torch without CUDA.
        packages: name → version of every Python package.
    """

    revision: str
    base: str = ""
    base_digest: str = ""
    lock: str = ""
    architectures: tuple[str, ...] = ()
    packages: tuple[tuple[str, str], ...] = ()


def container_program() -> str | None:
    """The path of apptainer or singularity; None if neither is in PATH."""
    return shutil.which("apptainer") or shutil.which("singularity")


def read_labels(program: str, image: Path) -> ImageLabels | None:
    """The labels of an image; None: it is not ftlib's, or cannot be read within 20 s.

    Args:
        program: apptainer or singularity.
    """
    command = [program, "inspect", "--labels", str(image)]
    try:
        shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    pairs = (line.partition(": ") for line in shown.splitlines() if line.startswith(_PREFIX))
    found = {key.removeprefix(_PREFIX): value.strip() for key, _, value in pairs}
    if "revision" not in found:
        return None
    packages = (package.partition("==") for package in found.get("packages", "").split())
    return ImageLabels(
        revision=found["revision"],
        base=found.get("base", ""),
        base_digest=found.get("base.digest", ""),
        lock=found.get("lock", ""),
        architectures=tuple(found.get("architectures", "").split()),
        packages=tuple((name, version) for name, _, version in packages),
    )
