"""Resources and options of a job, and their translation to submitit's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ftlib.config.schema import Config, SbatchOption
from ftlib.core.text import option_error, raise_error
from ftlib.errors import UserError

_FROM_SITE = ("partition", "account", "qos", "constraint")
_GPU_OPTIONS = ("gres", "gpus-per-node", "gpus")


@dataclass(frozen=True)
class JobSpec:
    """One job, or every element of an array.

    Attributes:
        gpus: per node; one task for each, or a single task without GPUs.
        gpu_option: sbatch option that requests GPUs at this site: gres, gpus-per-node or gpus.
        gres: further generic resources of a node.
        cpus: per task.
        mem, mem_per_cpu, mem_per_gpu: in Slurm's notation; at most one is set, and without one the site decides.
        minutes: time limit, rounded up.
        signal: seconds before the time limit at which the job gets USR1.
        dependency: of the job itself, as for sbatch.
        options: further options of sbatch; True for a flag.
        export: sbatch's --export, passed in the environment: it may contain a token, and scripts are readable.
        array_parallelism: maximum number of elements that run at the same time.
    """

    name: str
    gpus: int
    gpu_type: str | None
    gpu_option: str
    gres: Sequence[str]
    cpus: int
    mem: str | None
    mem_per_cpu: str | None
    mem_per_gpu: str | None
    minutes: int
    signal: int
    dependency: str | None
    nodes: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    mail_type: str | None
    mail_user: str | None
    options: tuple[tuple[str, str | int | bool], ...]
    export: str | None
    array_parallelism: int

    @classmethod
    def of(cls, config: Config, settings: Mapping[str, str]) -> JobSpec:
        """Return the job of a config's `job` section.

        Args:
            settings: jobs/site.env and the environment; SBATCH_PARTITION and the like are defaults for `job`.

        Raises:
            UserError: FTLIB_GPU_OPTION is no option for GPUs, or a setting has a line break or a backslash.
        """
        job = config.job
        gpu_option = settings.get("FTLIB_GPU_OPTION", "gres")
        if gpu_option not in _GPU_OPTIONS:
            raise UserError(f"FTLIB_GPU_OPTION={gpu_option}: must be one of {', '.join(_GPU_OPTIONS)}")
        own = job.model_dump(exclude={"time", "sbatch", "gpus"})
        site = {name: own[name] or _setting(settings, f"SBATCH_{name.upper()}") or None for name in _FROM_SITE}
        options = _site_options(settings)
        options.update({str(option): value for option, value in job.sbatch.items()})
        return cls(
            name=config.name,
            gpu_option=gpu_option,
            gpus=job.gpus,
            minutes=minutes_of(job.time),
            options=tuple(sorted(options.items())),
            export=settings.get("SBATCH_EXPORT"),
            **{**own, **site},
        )

    def parameters(self, setup: Sequence[str], dependency: str | None) -> dict[str, Any]:
        """Return the parameters for submitit's SlurmExecutor.

        Args:
            setup: shell lines before the command.
            dependency: of this array, as for sbatch, such as afterany:12.
        """
        further: dict[str, Any] = {"signal": f"B:USR1@{self.signal}", "requeue": True}
        if self.gpu_option == "gpus" and self.gpus:
            further["gpus"] = self._with_type(self.gpus * self.nodes)
        if dependency:
            further["kill-on-invalid-dep"] = "yes"
        return {
            "job_name": self.name,
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": max(1, self.gpus),
            "cpus_per_task": self.cpus,
            "mem": self.mem,
            "mem_per_cpu": self.mem_per_cpu,
            "mem_per_gpu": self.mem_per_gpu,
            **self._node_resources(),
            **{name: getattr(self, name) for name in (*_FROM_SITE, "exclude", "mail_type", "mail_user")},
            "array_parallelism": self.array_parallelism,
            "dependency": dependency,
            "wckey": None,
            "setup": list(setup),
            "use_srun": False,
            "stderr_to_stdout": True,
            "additional_parameters": {**dict(self.options), **further},
        }

    def _node_resources(self) -> dict[str, str]:
        """GPUs per node, and what else a node must have."""
        number, gres = self._with_type(self.gpus), list(self.gres)
        if self.gpus and self.gpu_option == "gres":
            gres.insert(0, f"gpu:{number}")
        per_node = {"gpus_per_node": number} if self.gpus and self.gpu_option == "gpus-per-node" else {}
        return {**({"gres": ",".join(gres)} if gres else {}), **per_node}

    def _with_type(self, gpus: int) -> str:
        return f"{self.gpu_type}:{gpus}" if self.gpu_type else str(gpus)


def _site_options(settings: Mapping[str, str]) -> dict[str, str | int | bool]:
    """Return allowed options that jobs/site.env or the environment set with sbatch's variables."""
    named = {option: f"SBATCH_{option.upper().replace('-', '_')}" for option in get_args(SbatchOption)}
    return {option: _setting(settings, name) or True for option, name in named.items() if name in settings}


def _setting(settings: Mapping[str, str], name: str) -> str:
    value = settings.get(name, "")
    raise_error(name, option_error(value))
    return value


def minutes_of(time: str) -> int:
    """Convert Slurm's time format (sbatch --time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) to minutes, rounded up."""
    days, dash, rest = time.rpartition("-")
    fields = [int(field) for field in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, minutes, seconds = 0, *(*fields, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)
