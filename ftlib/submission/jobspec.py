"""What one job asks of the cluster, and its translation into sbatch's options."""

from __future__ import annotations

from dataclasses import dataclass

from ftlib.config import Config


@dataclass(frozen=True)
class JobSpec:
    """One job.

    Attributes:
        cpus: for each GPU.
        minutes: time limit, rounded up.
        mem: memory per node in Slurm's notation.
    """

    name: str
    gpus: int
    cpus: int
    mem: str
    minutes: int

    @classmethod
    def of(cls, config: Config) -> JobSpec:
        """The job that a config's `job:` section describes."""
        job = config.job
        return cls(name=config.name, gpus=job.gpus, cpus=job.cpus, mem=job.mem, minutes=minutes_of(job.time))

    def sbatch_options(self) -> list[str]:
        """Options that override those in the batch script."""
        return [
            f"--job-name={self.name}",
            f"--ntasks-per-node={max(1, self.gpus)}",
            f"--cpus-per-task={self.cpus}",
            f"--mem={self.mem}",
            f"--time={self.minutes}",
            f"--gres={f'gpu:{self.gpus}' if self.gpus else 'none'}",
        ]


def minutes_of(time: str) -> int:
    """Slurm's time notation (sbatch --time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up."""
    days, dash, rest = time.rpartition("-")
    fields = [int(field) for field in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, minutes, seconds = 0, *(*fields, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)
