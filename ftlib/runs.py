"""Run folders: where everything of a run lies, who is alive on it, and what happened to it.

`<runs>/<name>/<identity>/` holds config.yaml, environment.json, data.json, owner.json, checkpoints/, adapter/ or
model/, metrics.jsonl, history.jsonl, eval/, report.html and DONE.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import files
from ftlib.config_file import Experiment
from ftlib.errors import EXIT_FAILURE, Busy, UserError
from ftlib.site import Site

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 60
_CHECKPOINT = "checkpoint-"


@dataclass(frozen=True)
class Run:
    """A run folder and the paths in it."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line per optimizer step."""
        return self.folder / "metrics.jsonl"

    @property
    def history(self) -> Path:
        """One line per start and end of an attempt."""
        return self.folder / "history.jsonl"

    @property
    def environment(self) -> Path:
        """A list: for each start of the run, what it was made with."""
        return self.folder / "environment.json"

    @property
    def data(self) -> Path:
        """The prepared data that the run was trained on: folder and fingerprints."""
        return self.folder / "data.json"

    @property
    def code(self) -> Path:
        """The package that the run began with."""
        return self.folder / "code"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def done(self) -> Path:
        return self.folder / "DONE"

    def result(self, method: str) -> Path:
        """The trained weights: a PEFT adapter, or a whole model."""
        return self.folder / ("model" if method == "full" else "adapter")

    def checkpoints(self, attempt: int = 0) -> Path:
        return self.folder / "checkpoints" / f"attempt-{attempt}"

    def evaluation(self, dataset: str, split: str, when: str) -> Path:
        return self.folder / "eval" / dataset / split / when

    def note(self, event: str, **details: Any) -> None:
        """Add a line to the run's history."""
        record = {"event": event, "time": round(time.time(), 3), "host": _host(), "job": _job(), **details}
        files.append_jsonl(self.history, record)

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Add this start's surroundings to environment.json."""
        earlier = files.read_json(self.environment) if self.environment.exists() else []
        files.write_json(self.environment, [*earlier, {"time": round(time.time(), 3), **environment}])


def run_of(experiment: Experiment, site: Site) -> Run:
    """The run folder of an experiment, which need not be there."""
    return Run(site.runs / experiment.config.name / experiment.identity)


def open_run(experiment: Experiment, site: Site) -> Run:
    """The run folder of an experiment, made if need be, with its resolved config in it."""
    run = run_of(experiment, site)
    text = experiment.to_yaml()
    if not run.config_file.exists() or run.config_file.read_text(encoding="utf-8") != text:
        files.write_text(run.config_file, text)
    return run


def find_run(text: str, site: Site) -> Run:
    """A run by its folder, its `name/identity`, or its name if that is unique.

    Raises:
        UserError: no such run, or several.
    """
    for folder in (Path(text), site.runs / text):
        if (folder / "config.yaml").is_file():
            return Run(folder.absolute())
    under = sorted((site.runs / text).glob("*/config.yaml"))
    if len(under) == 1:
        return Run(under[0].parent)
    if under:
        choices = "\n".join(f"  {path.parent.parent.name}/{path.parent.name}" for path in under)
        raise UserError(f"{text}: several runs have this name", f"Name one of them:\n{choices}")
    known = sorted(path.parent.parent.name for path in site.runs.glob("*/*/config.yaml"))
    names = ", ".join(dict.fromkeys(known)) or "none"
    remedy = f"Runs in {site.runs}: {names}"
    raise UserError(f"{text}: no such run", remedy)


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"{_CHECKPOINT}{step}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first; torn and temporary folders are left out."""
    found = []
    for folder in root.glob(f"{_CHECKPOINT}*"):
        number = folder.name.removeprefix(_CHECKPOINT)
        if number.isdigit() and files.is_complete(folder):
            found.append((int(number), folder))
    return sorted(found)


def last_checkpoint(root: Path) -> tuple[int, Path] | None:
    """The newest checkpoint whose every file has the size and hash that its marker names."""
    for step, folder in reversed(list_checkpoints(root)):
        if files.is_complete(folder, thorough=True):
            return step, folder
    return None


def remove_checkpoints_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps: damaged ones that were passed over, which would crowd out good ones."""
    for folder in root.glob(f"{_CHECKPOINT}*"):
        number = folder.name.removeprefix(_CHECKPOINT)
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder, ignore_errors=True)


def rotate_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and whatever killed writers left."""
    complete = list_checkpoints(root)
    kept = {folder for _, folder in complete[-keep:]}
    for folder in root.glob(f"{_CHECKPOINT}*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the one living process that writes to a folder; if another takes over, this process ends at once.

    `owner.json` names host, process and Slurm job; its modification time is the heartbeat. An owner is dead when its
    process is gone (same host), when it is this very job (requeued), or when its heartbeat is older than
    `STALE_SECONDS` by the storage's own clock. No file locks: on shared storage they may do nothing.

    Raises:
        Busy: another living process owns the folder.
    """
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
    return owner is not None and owner["job"] == _job()


def _identify() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": _host(),
        "pid": pid,
        "started": process_start(pid),
        "job": _job(),
        "token": uuid.uuid4().hex,
    }


def _host() -> str:
    """The node's name as Slurm calls it, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _job() -> str | None:
    """This Slurm job's number, the same after a requeue."""
    return os.environ.get("SLURM_JOB_ID")


def process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _take(path: Path, me: dict[str, Any]) -> None:
    """Create owner.json exclusively (a hard link fails if the name exists, on NFS too), after removing a dead one."""
    proposal = path.with_name(f"owner.{me['token']}")
    files.write_json(proposal, me)
    try:
        while True:
            try:
                os.link(proposal, path)
                return
            except FileExistsError:
                if _read_owner(path) == me:  # NFS lost the answer, not the link
                    return
                _remove_dead(path, proposal)
    finally:
        proposal.unlink(missing_ok=True)


def _remove_dead(path: Path, proposal: Path) -> None:
    other = _read_owner(path)
    if other is None:
        return
    if _is_alive(other, path, proposal):
        job = f", Slurm job {other['job']}" if other["job"] else ""
        raise Busy(
            f"{path.parent}: another process is at work on it: process {other['pid']} on {other['host']}{job}",
            "Wait for it or stop it; then run the same command again.",
        )
    aside = path.with_name(f"{proposal.name}.dead")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read_owner(aside) != other:  # somebody else was quicker: what we moved is alive, put it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        owner: dict[str, Any] = json.loads(path.read_text())
        return owner
    except FileNotFoundError:
        return None


def _is_alive(owner: dict[str, Any], path: Path, proposal: Path) -> bool:
    if owner["host"] == _host():
        return process_start(owner["pid"]) == owner["started"]
    if owner["job"] is not None and owner["job"] == _job():
        return False
    os.utime(proposal)
    return proposal.stat().st_mtime - path.stat().st_mtime < STALE_SECONDS


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
