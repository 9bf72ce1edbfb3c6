"""Slurm jobs: specification, submission, sweeps and status."""
