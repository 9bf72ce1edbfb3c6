"""Hand a training to Slurm (jobs/train.sbatch), or through submitit to a process of this machine or to this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import submitit

from ftlib.errors import UserError
from ftlib.site import REPOSITORY
from ftlib.submission.jobspec import JobSpec


def run_command(arguments: list[str]) -> int:
    """Run `ftlib ARGUMENTS…` and return its exit code; what submitit pickles is this name and strings only.

    Raises:
        RuntimeError: the command failed, so that the job counts as failed.
    """
    code = subprocess.run([sys.executable, "-m", "ftlib", *arguments], check=False).returncode
    if code:
        raise RuntimeError(f"ftlib {' '.join(arguments)} ended with exit code {code}")
    return code


def _sbatch(arguments: list[str], spec: JobSpec) -> str:
    """jobs/train.sbatch enters the container, answers signals and requeues."""
    script = REPOSITORY / "jobs" / "train.sbatch"
    if not script.is_file():
        raise UserError(f"{script} is not there", "Submit from a clone of the repository.")
    command = ["sbatch", "--parsable", *spec.sbatch_options(), str(script), *arguments[1:]]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError("sbatch is not in PATH", "Use --executor local on a machine without Slurm.") from None
    if done.returncode:
        raise UserError(f"sbatch refuses this job: {done.stderr.strip()}")
    return done.stdout.strip()


def launch(arguments: list[str], spec: JobSpec, executor: str, logs: Path) -> str:
    """Submit `ftlib train CONFIG KEY=VALUE…`.

    Args:
        executor: slurm, local or debug; `debug` runs the command before it returns.
        logs: folder for submitit's files and the job's output.

    Returns:
        The job's id.

    Raises:
        UserError: this machine has no Slurm, or it refuses the job.
    """
    if executor == "slurm":
        return _sbatch(arguments, spec)
    submitter = submitit.AutoExecutor(folder=logs, cluster=executor)
    submitter.update_parameters(name=spec.name, timeout_min=spec.minutes)
    job = submitter.submit(run_command, arguments)
    if executor == "debug":
        job.result()
    return str(job.job_id)
