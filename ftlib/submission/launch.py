"""The name under which jobs that were queued by ftlib 0.1 find their command."""

from ftlib.slurm.executors import run_stage_command

__all__ = ["run_stage_command"]
