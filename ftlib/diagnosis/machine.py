"""Python, packages, the hub's token."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import site
import sys
from collections.abc import Iterator
from pathlib import Path

from ftlib.diagnosis.finding import Finding


def python() -> Iterator[Finding]:
    """Its version."""
    old = sys.version_info < (3, 10)
    yield Finding("Python", platform.python_version(), "ftlib needs Python 3.10 or newer." if old else "", old)


def packages() -> Iterator[Finding]:
    """Versions of what training needs."""
    missing = []
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        remedy = "A login node needs none of them. To train here: pip install 'ftlib[train]'."
        yield Finding("packages", f"{', '.join(missing)} not installed", remedy)


def user_packages() -> Iterator[Finding]:
    """Packages in the home folder win over those of the image."""
    folder = Path(site.getusersitepackages())
    shadows = [name for name in ("torch", "transformers", "peft", "numpy", "pydantic") if (folder / name).exists()]
    if not shadows or os.environ.get("PYTHONNOUSERSITE"):
        yield Finding("packages in ~/.local", "none that would shadow others")
    else:
        remedy = "export PYTHONNOUSERSITE=1 (jobs/run.sh does)."
        yield Finding("packages in ~/.local", f"{', '.join(shadows)} in {folder} win over others", remedy)


def token() -> Iterator[Finding]:
    """Whether others can read the hub's token, or see it in the environment of processes."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    if not path.exists():
        yield Finding("hub token", "none (needed only for gated models)")
    elif path.stat().st_mode & 0o077:
        yield Finding("hub token", f"{path} can be read by others", f"chmod 600 {path}", fatal=True)
    else:
        yield Finding("hub token", f"{path} is private")
    if os.environ.get("HF_TOKEN"):
        remedy = (
            "Write it to a file of mode 0600 with `hf auth login` and unset HF_TOKEN: jobs inherit the environment."
        )
        yield Finding("HF_TOKEN", "is set in the environment", remedy)


def hub_access() -> Iterator[Finding]:
    """Whether the hub is asked at all."""
    state = "off: models come from the store" if os.environ.get("HF_HUB_OFFLINE") == "1" else "on (jobs turn it off)"
    yield Finding("hub access", state)
