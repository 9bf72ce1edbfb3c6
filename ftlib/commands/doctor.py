"""Check this machine: Python, packages, store, Slurm, hub token; say what to do about each finding."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib import command_line, files
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.site import find_site


@dataclass(frozen=True)
class Finding:
    """One check's outcome; `remedy` is empty when nothing is to be done."""

    check: str
    state: str
    remedy: str = ""
    fatal: bool = False


def main(argv: list[str]) -> int:
    """`ftlib doctor`"""
    command_line.parser("doctor", __doc__).parse_args(argv)
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        mark = "FAIL" if finding.fatal else "note" if finding.remedy else "ok"
        print(f"{mark:4}  {finding.check}: {finding.state}")
        if finding.remedy:
            print(f"      {finding.remedy}")
    return EXIT_FAILURE if any(finding.fatal for finding in findings) else 0


def _python() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    yield Finding("Python", platform.python_version(), "ftlib needs Python 3.10 or newer." if old else "", old)


def _packages() -> Iterator[Finding]:
    missing = []
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        remedy = "A login node needs none of them. To train here: pip install 'ftlib[train]'."
        yield Finding("packages", f"{', '.join(missing)} not installed", remedy)


def _store() -> Iterator[Finding]:
    try:
        site = find_site()
        for name, folder in (("store", site.store), ("runs", site.runs)):
            probe = folder / f".doctor-{os.getpid()}"
            files.write_text(probe, "")
            probe.unlink()
            free = shutil.disk_usage(folder).free / 1e9
            yield Finding(name, f"{folder} is writable, {free:.0f} GB free")
    except UserError as error:
        yield Finding("store", error.problem, error.remedy, fatal=True)


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch"):
        yield Finding("Slurm", "sbatch is there")
    else:
        yield Finding("Slurm", "sbatch is not in PATH", "Without it: ftlib train, or ftlib submit --executor local.")


def _token() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    if not path.exists():
        yield Finding("hub token", "none (needed only for gated models)")
    elif path.stat().st_mode & 0o077:
        yield Finding("hub token", f"{path} can be read by others", f"chmod 600 {path}", fatal=True)
    else:
        yield Finding("hub token", f"{path} is private")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _store, _slurm, _token)
