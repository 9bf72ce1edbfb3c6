"""Handlers for Slurm's signals; they end a command with an exit code.

USR1 (time limit near) and TERM (preempted or cancelled) end a command with `EXIT_REQUEUE`: its state is saved, and the
same command resumes from there. `install_handlers` runs before any heavy import, because a signal without a handler
kills Python. By default a signal ends the process immediately (an exception would abort it: torch's imports call back
into Python from C++). Inside `raise_on_signal` it raises, so that resources are released; inside `defer_signals` it is
only recorded, for work that must reach a boundary first.

The host script (`jobs/run.sh`) names a folder in FTLIB_JOB_TMP. Files in it report to the script that the handlers are
installed (`ready`), which signal ended the command (`signal`), the run folder (`run`), that a checkpoint was written
(`checkpointed`), when the first step began and how many seconds a step takes (`pace`), the exit code of the first
rank that failed (`failed`), and the commands that have been run to their end (`done`); `told` reports to the other
ranks that one of them has recorded the reason in the run's history. The script itself writes `begun` when
Slurm has started the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

from ftlib.errors import EXIT_REQUEUE

_process = os.getpid()
_pending: str | None = None
_resumable = False
_mode: Literal["exit", "raise", "note"] = "exit"


class Preempted(BaseException):
    """A signal asked this process to end. Not an Exception, so that no handler takes it for a failure."""


def install_handlers() -> None:
    """Handle USR1 and TERM from now on, and notify the host script. Called once at the start of a command."""
    global _resumable
    _resumable = False
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _handle_signal)
    notify_host("ready")


def mark_resumable() -> None:
    """Note that the same command would resume from what is saved."""
    global _resumable
    _resumable = True


def end_message(reason: str) -> str:
    """The message of a command that ends early."""
    return f"{reason}; run the same command again to resume" if _resumable else reason


def adopt_remote_signal(name: str) -> None:
    """Treat a signal that another rank of this job received as this process's."""
    global _pending
    _pending = _pending or name


def pending_signal() -> str | None:
    """The name of the signal that asked this process to end; None if there was none."""
    return _pending


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """In the body a signal raises, and so does one that came before.

    Raises:
        Preempted: a signal came.
    """
    with _signal_mode("raise"):
        if _pending:
            raise Preempted(_pending)
        yield


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """In the body a signal is only recorded; at its end it raises.

    Raises:
        Preempted: a signal came.
    """
    with _signal_mode("note"):
        yield
    if _pending:
        raise Preempted(_pending)


@contextlib.contextmanager
def _signal_mode(answer: Literal["exit", "raise", "note"]) -> Iterator[None]:
    global _mode
    before, _mode = _mode, answer
    try:
        yield
    finally:
        _mode = before


def notify_host(name: str, text: str = "") -> None:
    """Write a file for the host script, if this process was started by it."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder and os.environ.get("SLURM_PROCID", "0") == "0":
        with contextlib.suppress(OSError):
            (Path(folder) / name).write_text(text)


def notify_done(command: str) -> None:
    """Report to the host script that a command has been run to its end: this one, or one that would follow."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder and os.environ.get("SLURM_PROCID", "0") == "0":
        with contextlib.suppress(OSError), (Path(folder) / "done").open("a") as file:
            file.write(f"{command}\n")


def following_command() -> str:
    """The ftlib command that the host script will start after this one; "" if there is none."""
    return os.environ.get("FTLIB_FOLLOWING", "")


def notify_failure(code: int) -> None:
    """Report this rank's exit code to the host script, if no other rank has failed before."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder:
        with contextlib.suppress(OSError), (Path(folder) / "failed").open("x") as note:
            note.write(str(code))


def claim_first(name: str) -> bool:
    """Whether this rank is the first of its job to claim a name. Without a host script every rank is."""
    folder = os.environ.get("FTLIB_JOB_TMP")
    if folder:
        with contextlib.suppress(FileNotFoundError):
            try:
                (Path(folder) / name).open("x").close()
            except FileExistsError:
                return False
    return True


def _handle_signal(number: int, frame: FrameType | None) -> None:
    """Ignores repeated signals: Apptainer may deliver one twice, and Slurm sends more than one."""
    global _pending
    if os.getpid() != _process:  # a data-loading worker, forked with our handlers
        os._exit(128 + number)
    if _pending is not None:
        return
    _pending = signal.Signals(number).name
    notify_host("signal", _pending)
    if _mode == "raise":
        raise Preempted(_pending)
    if _mode == "exit":
        os.write(2, f"ftlib: {end_message(f'ended by {_pending}')}\n".encode())
        os._exit(EXIT_REQUEUE)
