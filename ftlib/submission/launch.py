"""Hand a command to submitit: to Slurm, to a process on this machine, or to this very process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import submitit

from ftlib.errors import UserError
from ftlib.submission.jobspec import JobSpec

EXECUTORS = ("slurm", "local", "debug")


def run_command(arguments: list[str]) -> int:
    """Run `ftlib ARGUMENTS…` and return its exit code; what submitit pickles is this name and strings only.

    Raises:
        RuntimeError: the command failed, so that the job counts as failed.
    """
    code = subprocess.run([sys.executable, "-m", "ftlib", *arguments], check=False).returncode
    if code:
        raise RuntimeError(f"ftlib {' '.join(arguments)} ended with exit code {code}")
    return code


def launch(arguments: list[str], spec: JobSpec, executor: str, logs: Path) -> str:
    """Submit `ftlib ARGUMENTS…`.

    Args:
        executor: one of `EXECUTORS`; `debug` runs the command before it returns.
        logs: folder for submitit's files and the job's output.

    Returns:
        The job's id.

    Raises:
        UserError: this machine has no Slurm.
    """
    try:
        submitter = submitit.AutoExecutor(folder=logs, cluster=executor)
    except RuntimeError as error:
        raise UserError(f"executor {executor}: {error}", "Use --executor local on a machine without Slurm.") from None
    parameters = spec.submitit_parameters()
    if executor != "slurm":
        parameters.pop("gpus_per_node", None)
    submitter.update_parameters(**parameters)
    job = submitter.submit(run_command, arguments)
    if executor == "debug":
        job.result()
    return str(job.job_id)
