"""What one job asks of the cluster, and its translation into submitit's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlib.config import Config


@dataclass(frozen=True)
class JobSpec:
    """One job.

    Attributes:
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

    def submitit_parameters(self) -> dict[str, Any]:
        """Keyword arguments of submitit's `AutoExecutor.update_parameters`."""
        return {
            "name": self.name,
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "slurm_mem": self.mem,
            **({"gpus_per_node": self.gpus} if self.gpus else {}),
        }


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
