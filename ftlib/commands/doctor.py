"""Check this machine: packages, store, Slurm, image, hub token, and with CONFIG what its job would miss.

Every finding that is not in order comes with what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib import command_line, files, hub
from ftlib.config_file import load_experiment
from ftlib.data import prepared
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.site import find_site, site_settings


@dataclass(frozen=True)
class Finding:
    """One check's outcome; `remedy` is empty when nothing is to be done."""

    check: str
    state: str
    remedy: str = ""
    fatal: bool = False


def main(argv: list[str]) -> int:
    """`ftlib doctor [CONFIG]`"""
    command = command_line.parser("doctor", __doc__)
    command.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="also check what this config needs")
    parsed = command.parse_args(argv)
    findings = [finding for check in CHECKS for finding in check()]
    if parsed.config:
        findings += _config(parsed.config)
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
    if "SLURM_JOB_ID" in os.environ:
        yield Finding("Slurm", f"inside job {os.environ['SLURM_JOB_ID']}")
    elif "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ:
        yield Finding("Slurm", "not looked for inside the container")
    elif not shutil.which("sinfo"):
        yield Finding("Slurm", "sinfo is not in PATH", "Without it: ftlib train, or ftlib submit --executor local.")
    elif (answer := _ask("sinfo", "-h", "-o", "%P")) is None:
        yield Finding("Slurm", "does not answer", "Ask your site whether slurmctld is down.", fatal=True)
    else:
        yield Finding("Slurm", f"partitions {', '.join(answer.split())}")


def _image() -> Iterator[Finding]:
    inside = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if inside:
        yield Finding("image", f"inside {inside}")
        return
    settings = site_settings()
    path = Path(settings.get("FTLIB_IMAGE") or find_site().store / "images" / "ftlib.sif")
    program = shutil.which("apptainer") or shutil.which("singularity")
    build = "Build it: sbatch jobs/build.sbatch"
    if program is None:
        yield Finding("container", "neither apptainer nor singularity is in PATH", "Load its module, or train without.")
    elif not path.exists():
        yield Finding("image", f"{path} is not there", build)
    elif "org.ftlib.revision" not in (labels := _ask(program, "inspect", "--labels", str(path)) or ""):
        yield Finding("image", f"{path} is no image of ftlib", build, fatal=True)
    else:
        wanted = [line for line in labels.splitlines() if line.startswith("org.ftlib")]
        yield Finding("image", f"{path}: {', '.join(wanted)}")


def _ask(*command: str) -> str | None:
    """What a program prints; None if it fails or does not answer within 20 s."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError):
        return None


def _user_packages() -> Iterator[Finding]:
    folder = Path(site.getusersitepackages())
    shadows = [name for name in ("torch", "transformers", "peft", "numpy", "pydantic") if (folder / name).exists()]
    if not shadows or os.environ.get("PYTHONNOUSERSITE"):
        yield Finding("packages in ~/.local", "none that would shadow others")
    else:
        remedy = "export PYTHONNOUSERSITE=1 (jobs/run.sh does)."
        yield Finding("packages in ~/.local", f"{', '.join(shadows)} in {folder} win over others", remedy)


def _config(path: Path) -> Iterator[Finding]:
    try:
        here = find_site()
        config = load_experiment(path, [], here).config
        yield Finding("config", f"{path} is in order")
        yield Finding("model", f"{config.model.base} in {hub.find_model(config.model, here)}")
        folder = prepared.prepared_folder(config, here)
        remedy = "" if files.is_complete(folder) else f"Run `ftlib prepare {path}`; jobs/train.sbatch does it too."
        yield Finding("dataset", f"{folder} is {'not ' if remedy else ''}prepared", remedy)
    except UserError as error:
        yield Finding("config", error.problem, error.remedy or "Mend it.", fatal=True)


def _token() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    if not path.exists():
        yield Finding("hub token", "none (needed only for gated models)")
    elif path.stat().st_mode & 0o077:
        yield Finding("hub token", f"{path} can be read by others", f"chmod 600 {path}", fatal=True)
    else:
        yield Finding("hub token", f"{path} is private")


def _offline() -> Iterator[Finding]:
    state = "off: models come from the store" if os.environ.get("HF_HUB_OFFLINE") == "1" else "on (jobs turn it off)"
    yield Finding("hub access", state)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _user_packages,
    _store,
    _slurm,
    _image,
    _token,
    _offline,
)
