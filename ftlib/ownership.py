"""The one living process that may write to a folder: taken, kept by a heartbeat, and given up.

`owner.json` in the folder names host, process and Slurm job; its modification time is the heartbeat. An owner is dead
when its process is gone (same host), when it is this very job (requeued), or when its heartbeat is older than
`STALE_SECONDS` by the storage's own clock. No file locks: on shared storage they may do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.runs import host_name, job_number, process_start

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 60


class Occupied(UserError):
    """Another living process owns the folder."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the one living process that writes to a folder; if another takes over, this process ends at once.

    Of a job's ranks that is the first; to the others nothing happens.

    Raises:
        Occupied: another living process owns the folder.
    """
    if not console.speaks():
        yield
        return
    path = folder / "owner.json"
    me = _identify()
    _take(path, me)
    stop = threading.Event()
    beat = threading.Thread(target=_heartbeat, args=(path, me, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _read_owner(path) == me:
            path.unlink(missing_ok=True)


def owned_by_this_job(folder: Path) -> bool:
    """Whether a task of this very Slurm job owns a folder."""
    owner = _read_owner(folder / "owner.json")
    return owner is not None and owner["job"] == job_number()


def _identify() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": host_name(),
        "pid": pid,
        "started": process_start(pid),
        "job": job_number(),
        "token": uuid.uuid4().hex,
    }


def _take(path: Path, me: dict[str, Any]) -> None:
    """Create an owner's file exclusively (a hard link fails if the name exists, on NFS too) or replace a dead one's."""
    proposal = path.with_name(f"{path.name}.{me['token']}")
    files.write_json(proposal, me)
    try:
        while True:
            try:
                os.link(proposal, path)
                return
            except FileExistsError:
                if _read_owner(path) == me:  # NFS lost the answer, not the link
                    return
                if _replace_dead(path, proposal, me):
                    return
    finally:
        proposal.unlink(missing_ok=True)


def _replace_dead(path: Path, proposal: Path, me: dict[str, Any]) -> bool:
    """Put the proposal in the place of a dead owner's file; False if that is gone.

    Only who owns the right to bury that very owner may touch the file: of many that see the same dead owner, one must
    not move away what another has just put there.
    """
    other = _read_owner(path)
    if other is None:
        return False
    os.utime(proposal)
    if _is_alive(other, path, proposal.stat().st_mtime):
        job = f", Slurm job {other['job']}" if other["job"] else ""
        raise Occupied(
            f"{path.parent}: another process is at work on it: process {other['pid']} on {other['host']}{job}",
            "Wait for it or stop it; then run the same command again.",
        )
    burial = path.with_name(f"owner.{other['token']}.buried")
    _take(burial, me)
    try:
        if _read_owner(path) != other:
            return False
        proposal.replace(path)
        return True
    finally:
        burial.unlink(missing_ok=True)


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        owner: dict[str, Any] = json.loads(path.read_text())
        return owner
    except FileNotFoundError:
        return None


def living_owner(folder: Path, now: float) -> dict[str, Any] | None:
    """What owner.json says of the process that is at work on a folder; None if nobody is.

    Args:
        now: the time by the storage's clock.
    """
    path = folder / "owner.json"
    with contextlib.suppress(FileNotFoundError):
        owner = _read_owner(path)
        if owner and _is_alive(owner, path, now):
            return owner
    return None


def _is_alive(owner: dict[str, Any], path: Path, now: float) -> bool:
    if owner["host"] == host_name():
        return process_start(owner["pid"]) == owner["started"]
    if owner["job"] is not None and owner["job"] == job_number():
        return False
    return now - path.stat().st_mtime < STALE_SECONDS


def _heartbeat(path: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Show that we live, as long as the folder is ours.

    It is not after Slurm has lost this node, given the job to another and that one has taken over: two writers would
    ruin the run.
    """
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError, ValueError):
            if _read_owner(path) not in (me, None):
                os.write(2, f"ftlib: another process has taken {path.parent} over; ending\n".encode())
                os._exit(EXIT_FAILURE)
            os.utime(path)


def storage_time(folder: Path) -> float:
    """The time by the clock of the storage that a folder lies on, which stamps heartbeats; else this machine's."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as probe:
        return Path(probe.name).stat().st_mtime
    return time.time()
