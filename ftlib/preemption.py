"""Signals from Slurm, answered with an exit code.

USR1 (time limit near) and TERM (preempted or cancelled) end a command with `EXIT_AGAIN`: what is worth keeping is
saved, and the same command goes on from there. `install` runs before any heavy import, since until a handler stands a
signal simply kills Python. By default a signal ends the process on the spot (an exception would abort it: torch's
imports call back into Python from C++). Inside `unwinding` it raises, so that what is held is let go; inside `graceful`
it only leaves a note, for work that must reach a boundary first.

The host script (`jobs/run.sh`) gives a folder in FTLIB_JOB_TMP; there it learns that handlers stand (`ready`), which
signal ended the command (`signal`), which run is at work (`run`), that a checkpoint was written (`checkpointed`), and
how the first of several ranks failed (`failed`); ranks see there that one has told the run's history why (`told`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

from ftlib.errors import EXIT_AGAIN

MESSAGE = "ended by {}; the same command goes on from what is saved"

_process = os.getpid()
_requested: str | None = None
_answer: Literal["exit", "raise", "note"] = "exit"


class Preempted(BaseException):
    """A signal asked this process to end; no Exception, so that nothing on the way takes it for a failure."""


def install() -> None:
    """Answer USR1 and TERM from now on, and tell the host script so."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _handle)
    tell_host("ready")


def request(name: str) -> None:
    """Take a signal that another rank of this job was sent for our own."""
    global _requested
    _requested = _requested or name


def requested() -> str | None:
    """The name of the signal that asked us to end, if one did."""
    return _requested


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside, a signal raises; so does one that was noted before.

    Raises:
        Preempted: a signal came.
    """
    with _answering("raise"):
        if _requested:
            raise Preempted(_requested)
        yield


@contextlib.contextmanager
def graceful() -> Iterator[None]:
    """Inside, a signal is only noted; on leaving, it raises.

    Raises:
        Preempted: a signal came.
    """
    with _answering("note"):
        yield
    if _requested:
        raise Preempted(_requested)


@contextlib.contextmanager
def _answering(answer: Literal["exit", "raise", "note"]) -> Iterator[None]:
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def tell_host(name: str, text: str = "") -> None:
    """Leave a note for the host script; without one, do nothing."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder and os.environ.get("SLURM_PROCID", "0") == "0":
        with contextlib.suppress(OSError):
            (Path(folder) / name).write_text(text)


def tell_failure(code: int) -> None:
    """Leave this rank's exit code for the host script, if no other rank has failed before."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder:
        with contextlib.suppress(OSError), (Path(folder) / "failed").open("x") as note:
            note.write(str(code))


def first_to(name: str) -> bool:
    """Leave a note that only one rank may leave; whether we did. Without a host script, always."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder:
        with contextlib.suppress(FileNotFoundError):
            try:
                (Path(folder) / name).open("x").close()
            except FileExistsError:
                return False
    return True


def _handle(number: int, frame: FrameType | None) -> None:
    """Idempotent: Apptainer may deliver a signal twice, and Slurm sends more than one."""
    global _requested
    if os.getpid() != _process:  # a data-loading worker, forked with our handlers
        os._exit(128 + number)
    if _requested is not None:
        return
    _requested = signal.Signals(number).name
    tell_host("signal", _requested)
    if _answer == "raise":
        raise Preempted(_requested)
    if _answer == "exit":
        os.write(2, f"ftlib: {MESSAGE.format(_requested)}\n".encode())
        os._exit(EXIT_AGAIN)
