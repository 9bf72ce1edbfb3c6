"""A lease on a folder, kept alive by a heartbeat: only its holder may write there.

`owner.json` in the folder names the holder's host, process and Slurm job; its modification time is the heartbeat. A
holder is dead when its process is gone (same host), when it belongs to this same job (requeued), or when its heartbeat
is older than `STALE_SECONDS` by the storage's clock. No file locks are used: on shared storage they may have no effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ftlib.core import files, log
from ftlib.core.environment import host_name, job_id, process_start
from ftlib.errors import EXIT_FAILURE, UserError

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 60


class LeaseHeld(UserError):
    """Another living process holds the lease."""


@contextlib.contextmanager
def acquire_lease(folder: Path) -> Iterator[None]:
    """Hold the lease on a folder; if another process takes it over, this process exits at once.

    Of a job's ranks the first one holds it; in the other ranks this does nothing.

    Raises:
        LeaseHeld: another living process holds it.
    """
    if not log.is_main_process():
        yield
        return
    path = folder / "owner.json"
    me = _describe_holder()
    _claim(path, me)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, me, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _read_holder(path) == me:
            path.unlink(missing_ok=True)


def held_by_this_job(folder: Path) -> bool:
    """Whether a task of this Slurm job holds the lease on a folder."""
    owner = _read_holder(folder / "owner.json")
    return owner is not None and owner["job"] == job_id()


def _describe_holder() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": host_name(),
        "pid": pid,
        "started": process_start(pid),
        "job": job_id(),
        "token": uuid.uuid4().hex,
    }


def _claim(path: Path, me: dict[str, Any]) -> None:
    """Create owner.json exclusively (a hard link fails if the name exists, on NFS too) or replace a dead holder's."""
    proposal = path.with_name(f"{path.name}.{me['token']}")
    files.write_json(proposal, me)
    try:
        while True:
            try:
                os.link(proposal, path)
                return
            except FileExistsError:
                if _read_holder(path) == me:  # the link was made, but NFS lost the reply
                    return
                if _take_over(path, proposal, me):
                    return
    finally:
        proposal.unlink(missing_ok=True)


def _take_over(path: Path, proposal: Path, me: dict[str, Any]) -> bool:
    """Replace the file of a dead holder by the proposal; False if the file is gone.

    A second lease serializes takeovers of a dead holder: of several processes that see it, none may replace the file
    that another has just put there.
    """
    other = _read_holder(path)
    if other is None:
        return False
    os.utime(proposal)
    if _is_alive(other, path, proposal.stat().st_mtime):
        job = f", Slurm job {other['job']}" if other["job"] else ""
        raise LeaseHeld(
            f"{path.parent}: another process is working on it: process {other['pid']} on {other['host']}{job}",
            "Wait for it or stop it; then run the same command again.",
        )
    takeover_claim = path.with_name(f"owner.{other['token']}.buried")
    _claim(takeover_claim, me)
    try:
        if _read_holder(path) != other:
            return False
        proposal.replace(path)
        return True
    finally:
        takeover_claim.unlink(missing_ok=True)


def _read_holder(path: Path) -> dict[str, Any] | None:
    try:
        owner: dict[str, Any] = json.loads(path.read_text())
        return owner
    except FileNotFoundError:
        return None


def current_holder(folder: Path, now: float) -> dict[str, Any] | None:
    """The content of owner.json if its holder is alive; None otherwise.

    Args:
        now: the time by the storage's clock.
    """
    path = folder / "owner.json"
    with contextlib.suppress(FileNotFoundError):
        owner = _read_holder(path)
        if owner and _is_alive(owner, path, now):
            return owner
    return None


def _is_alive(owner: dict[str, Any], path: Path, now: float) -> bool:
    if owner["host"] == host_name():
        return process_start(owner["pid"]) == owner["started"]
    if owner["job"] is not None and owner["job"] == job_id():
        return False
    return now - path.stat().st_mtime < STALE_SECONDS


def _keep_alive(path: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Update the heartbeat, and exit if another process has taken the lease over.

    That happens after Slurm has lost this node and started the job on another one: two writers would corrupt the run.
    """
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError, ValueError):
            if _read_holder(path) not in (me, None):
                os.write(2, f"ftlib: another process has taken {path.parent} over; ending\n".encode())
                os._exit(EXIT_FAILURE)
            os.utime(path)


def storage_time(folder: Path) -> float:
    """The time by the clock of a folder's storage, as in heartbeats; this host's if the folder cannot be written to."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as probe:
        return Path(probe.name).stat().st_mtime
    return time.time()


# Compute something once across processes: the base model's answers in a sweep, a model in the store.

T = TypeVar("T")
POLL_SECONDS = 2.0


def compute_once(path: Path, find: Callable[[], T | None], compute: Callable[[], T | None], label: str) -> T | None:
    """The result of `find` or, if there is none and no other process is computing it, of `compute`.

    Other processes wait for the result; if the computing process dies, the next one takes over. All tasks of a job
    compute together.

    Args:
        path: a folder for the lease.
        label: for messages.
    """
    with files.storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    told = False
    while not (found := find()):
        if not log.is_main_process():
            if held_by_this_job(path):
                return compute()
        else:
            try:
                with acquire_lease(path):
                    return find() or compute()
            except LeaseHeld:
                if not told:
                    log.info(f"{label}: in progress in another process; waiting")
                told = True
        time.sleep(POLL_SECONDS)
    return found
