"""What a process of this machine does with its share of a submission: one run after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.errors import EXIT_AGAIN, EXIT_FAILURE
from ftlib.runs import Run, process_start

Commands = Sequence[Sequence[str]]
"""ftlib command lines, each as COMMAND ARGUMENTS…"""

_POLL_SECONDS = 1


def run_lane(tasks: Sequence[Commands], after: Sequence[str] = (), gpus: Sequence[str] | None = None) -> None:
    """Run several tasks one after the other; one that fails or is cancelled hides no other.

    Args:
        after: processes that must have ended before.
        gpus: those to use, as CUDA_VISIBLE_DEVICES names them; None leaves that as it is.

    Raises:
        SystemExit: with 75 if this process was asked to stop, with 1 in the end if a command failed.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    while any(process_start(int(process)) for process in after):
        time.sleep(_POLL_SECONDS)
    codes = [_run_task(commands) for commands in tasks]
    if any(codes):
        raise SystemExit(EXIT_FAILURE)


def _run_task(commands: Commands) -> int:
    """The exit code of the first command that failed, or 0."""
    for command in commands:
        if _is_taken_back(command[-1]):
            console.say(f"{' '.join(command)}: cancelled")
            return 0
        if code := _run(command):
            return code
    return 0


def _is_taken_back(config_file: str) -> bool:
    """Whether a run was cancelled, or submitted anew, since it was submitted to this process."""
    process = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    events = files.read_jsonl_log(Run(Path(config_file).parent).history)
    turns = [event for event in events if event["event"] in ("submitted", "cancelled")]
    ours = [event["event"] == "submitted" and event["job"] == process for event in turns]
    return any(ours) and not ours[-1]


def _run(arguments: Sequence[str]) -> int:
    told: list[int] = []
    with subprocess.Popen([sys.executable, "-m", "ftlib", *arguments]) as child:

        def hand_on(number: int, frame: Any) -> None:
            told.append(number)
            child.send_signal(number)

        before = signal.signal(signal.SIGTERM, hand_on)
        code = child.wait()
        signal.signal(signal.SIGTERM, before)
    if told:
        raise SystemExit(EXIT_AGAIN)
    return code
