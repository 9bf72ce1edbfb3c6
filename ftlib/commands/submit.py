"""Send a training job to Slurm (jobs/train.sbatch), or run it here: in the background (local) or at once (debug)."""

from __future__ import annotations

from pathlib import Path

from ftlib import command_line, console
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib submit CONFIG [KEY=VALUE…] [--executor slurm|local|debug]`"""
    command = command_line.parser("submit", __doc__)
    command.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm")
    command_line.add_config(command)
    parsed = command.parse_intermixed_args(argv)
    experiment = command_line.load(parsed, find_site())
    from ftlib.submission.jobspec import JobSpec
    from ftlib.submission.launch import launch

    arguments = ["train", str(parsed.config.absolute()), *parsed.overrides]
    logs = Path("logs").absolute() / experiment.config.name
    job = launch(arguments, JobSpec.of(experiment.config), parsed.executor, logs)
    console.say(f"job {job}; its output goes to {logs}")
    print(job)
    return 0
