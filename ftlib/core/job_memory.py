"""This job's memory: limit, peak use, and processes that the kernel has killed for memory.

Slurm limits a job by a cgroup. Every cgroup on the path applies: the smallest `memory.max` (version 2) or
`memory.limit_in_bytes` (version 1, where "none" is a huge number) is the limit. Without either,
SLURM_MEM_PER_NODE or SLURM_MEM_PER_CPU is used, else the machine's memory. Files in /dev/shm or any other tmpfs count
as used memory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ftlib.core.text import format_gib

_NAMES = {
    2: {"limit": "memory.max", "used": "memory.current", "peak": "memory.peak"},
    1: {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "peak": "memory.max_usage_in_bytes"},
}


@dataclass(frozen=True)
class JobMemory:
    """In bytes; None where unknown.

    Attributes:
        limit: of the job.
        source: of the limit, in words.
        peak: highest use, or the current use where the kernel keeps no peak.
        shared: in tmpfs, /dev/shm included; part of the use.
        oom_kills: processes of the job that the kernel has killed for memory.
    """

    limit: int | None
    source: str
    peak: int | None = None
    shared: int | None = None
    oom_kills: int = 0

    def __str__(self) -> str:
        if self.limit is None:
            return "how much memory the job has is not known"
        parts = [f"the job has {format_gib(self.limit, 1)} of memory ({self.source})"]
        parts += [f"at most {format_gib(self.peak, 1)} were in use"] if self.peak is not None else []
        parts += [f"{format_gib(self.shared, 1)} are in /dev/shm and other tmpfs, which counts"] if self.shared else []
        return ", ".join(parts)


def job_memory(root: Path = Path("/")) -> JobMemory:
    """The current state.

    Args:
        root: where /proc and /sys are.
    """
    version, folders = _cgroups(root)
    if folders:
        names = _NAMES[version]
        limits = {folder: limit for folder in folders if (limit := _number(folder / names["limit"])) is not None}
        machine = _machine_memory(root)
        held = {folder: limit for folder, limit in limits.items() if machine is None or limit < machine}
        if held:
            tight = min(held, key=lambda folder: held[folder])
            peak = _number(tight / names["peak"])
            return JobMemory(
                held[tight],
                f"{names['limit']} of its cgroup",
                _number(tight / names["used"]) if peak is None else peak,
                _field(tight / "memory.stat", "shmem" if version == 2 else "total_shmem"),
                _oom_kills(version, folders),
            )
    kills = _oom_kills(version, folders)
    if (limit := _slurm_limit()) is not None:
        return JobMemory(limit, "what Slurm was asked for", oom_kills=kills)
    return JobMemory(_machine_memory(root), "all of the machine's", shared=_meminfo(root, "Shmem"), oom_kills=kills)


def _cgroups(root: Path) -> tuple[int, list[Path]]:
    """The cgroup version, and the folders of this process's cgroup and its parents."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return 0, []
    of_memory = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    unified = next((path for number, kinds, path in lines if number == "0" and not kinds), None)
    path = unified if of_memory is None else of_memory
    if path is None:
        return 0, []
    version, top = (2, root / "sys/fs/cgroup") if of_memory is None else (1, root / "sys/fs/cgroup/memory")
    own = top if ".." in path else top / path.strip("/")  # in a container its own cgroup is the root
    if not own.is_dir():
        own = top
    chain = [own, *(folder for folder in own.parents if folder.is_relative_to(top))]
    return version, [folder for folder in chain if folder.is_dir()]


def _oom_kills(version: int, folders: list[Path]) -> int:
    """In version 2 counts include child cgroups, so the job's cgroup has those of all its tasks. Version 1 differs."""
    if not folders:
        return 0
    job = next((folder for folder in folders if folder.name.startswith("job_")), folders[0])
    if version == 2:
        return _field(job / "memory.events", "oom_kill") or 0
    return _field(folders[0] / "memory.oom_control", "oom_kill") or 0


def _slurm_limit() -> int | None:
    """From Slurm's variables, which are in MiB."""
    whole, each = (os.environ.get(f"SLURM_MEM_PER_{what}", "") for what in ("NODE", "CPU"))
    if whole.isdigit() and int(whole):
        return int(whole) << 20
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(each) * int(cpus) << 20 if each.isdigit() and cpus.isdigit() and int(each) else None


def _machine_memory(root: Path) -> int | None:
    return _meminfo(root, "MemTotal")


def _meminfo(root: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _field(path: Path, name: str) -> int | None:
    found = re.search(rf"^{name} (\d+)$", _text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" or if there is no file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
