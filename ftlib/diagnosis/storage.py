"""Store, runs and local temporary folder: writable, roomy, quick, and on time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ftlib import files
from ftlib.diagnosis.finding import Finding
from ftlib.errors import UserError
from ftlib.site import find_site

_PROBE_BYTES = 32 << 20
_SLOW = 20e6
"""Bytes a second; a checkpoint of 6 GB would take five minutes, longer than what Slurm leaves after its signal."""

_SKEW_SECONDS = 5.0
_LITTLE_BYTES = 5e9
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "wekafs", "panfs")


def roots() -> Iterator[Finding]:
    """Both roots: writable? how much is free? how fast? does their clock agree with this machine's?"""
    try:
        site = find_site()
        for name, folder in (("store", site.store), ("runs", site.runs)):
            probe = folder / f".doctor-{os.getpid()}"
            files.write_text(probe, "")
            probe.unlink()
            free = shutil.disk_usage(folder).free / 1e9
            yield Finding(name, f"{folder} is writable, {free:.0f} GB free")
            yield from _speed_and_clock(name, folder)
    except UserError as error:
        yield Finding("store", error.problem, error.remedy, fatal=True)


def _speed_and_clock(name: str, folder: Path) -> Iterator[Finding]:
    with files.storage_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        before = time.time()
        file.write(os.urandom(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        seconds = time.time() - before
        skew = os.fstat(file.fileno()).st_mtime - time.time()
    speed = _PROBE_BYTES / max(seconds, 1e-6)
    remedy = "Checkpoints will be slow: save less often (checkpoint.steps), or ask your site for faster storage."
    yield Finding(f"{name} speed", f"{speed / 1e6:.0f} MB/s written", remedy if speed < _SLOW else "")
    if abs(skew) > _SKEW_SECONDS:
        remedy = "Ask your site to set the clocks; times in logs and histories cannot be compared between machines."
        yield Finding(f"{name} clock", f"the storage is {skew:+.0f} s off this machine's clock", remedy)
    else:
        yield Finding(f"{name} clock", "agrees with this machine's")


def local_temporary() -> Iterator[Finding]:
    """Where compile caches and temporary files go: a local disk with some room."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    kind = _file_system(folder)
    state = f"{folder} ({kind}), {free / 1e9:.0f} GB free"
    if kind in _NETWORK:
        yield Finding("temporary", state, "It is on the network: set FTLIB_TMP in jobs/site.env to a local disk.")
    elif free < _LITTLE_BYTES:
        what = "It is in memory and small" if kind == "tmpfs" else "There is little room"
        yield Finding("temporary", state, f"{what}: set FTLIB_TMP in jobs/site.env to a local disk.")
    else:
        yield Finding("temporary", state)


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, by the longest mount point above it (proc(5), mounts)."""
    found = ("", "unknown")
    real = str(folder.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]
