"""What a job needs before it can start: image, model, data, and a request that the partition allows.

`ftlib submit` refuses jobs that lack something; `ftlib doctor CONFIG` reports the same.
"""

from __future__ import annotations

import functools
import grp
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ftlib.config.loader import Experiment
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.data.sources.registry import TOY_DATASETS
from ftlib.errors import UserError
from ftlib.hub import cache
from ftlib.runs.run import Run, run_for
from ftlib.runs.warm_start import warm_start_folder
from ftlib.slurm.client import JobLimit, NodeKind, Slurm, clean_environment
from ftlib.slurm.jobspec import JobSpec, minutes_of

TEST_SECONDS = 20
_REQUESTED = ("time", "nodes", "ntasks_per_node", "cpus_per_task", "mem", "mem_per_cpu", "mem_per_gpu", "gres",
              "gpus_per_node", "partition", "account", "qos", "constraint", "exclude")  # fmt: skip
_UNITS = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


def image_path(site: Site, settings: Mapping[str, str]) -> Path:
    """Return the container image of jobs."""
    return Path(settings.get("FTLIB_IMAGE") or site.store / "images" / "ftlib.sif").expanduser()


def require_image(site: Site, settings: Mapping[str, str]) -> None:
    """Raise a UserError if jobs run in a container and its image is not there."""
    path = image_path(site, settings)
    if settings.get("FTLIB_RUNTIME") != "none" and not path.is_file():
        remedy = "Build it: sbatch jobs/build.sbatch; or set FTLIB_IMAGE in jobs/site.env."
        raise UserError(f"image {path} is not there", remedy)


def require_model(experiment: Experiment, site: Site) -> None:
    """Raise a UserError if a base model is not in the store and the job cannot make it without the network."""
    if experiment.npz:
        if not files.is_complete(experiment.npz.folder) and not experiment.npz.file.is_file():
            raise UserError(f"model.base: {experiment.npz.file}: no such file", "See docs/models.md for the download.")
    elif not cache.is_embedded(experiment.config.model):
        cache.find_model(experiment.config.model, site)


def require_data(experiment: Experiment, site: Site) -> None:
    """Raise a UserError if a dataset is neither prepared nor there to be prepared."""
    config = experiment.config
    sources = {part.source for part in config.data.datasets.values()}
    if config.data.source_plugins or sources & set(TOY_DATASETS):  # doctor and submit run no plugin; jobs make the toys
        return
    for part in config.data.datasets.values():
        name = part.file.partition(":")[0]
        if part.source != "hub" and not Path(part.root).exists():
            problem = f"data.root: {part.root}: no such folder"
            raise UserError(problem, "Relative paths count from the config's folder; `ftlib prepare CONFIG` checks it.")
        repository = cache.Repository("dataset", name, None)
        if part.source == "hub" and not cache.is_local_path(name) and not cache.find_staged(repository, site):
            raise UserError(f"dataset {name} is not in the store", "Run `ftlib stage CONFIG` on the login node first.")


def require_warm_start(experiment: Experiment, site: Site) -> None:
    """Raise a UserError if the weights that training starts from are not there."""
    if experiment.config.warm_start is not None:
        warm_start_folder(experiment.config.warm_start, run_for(experiment, site), site)


def require_startable(experiments: Sequence[Experiment], site: Site, settings: Mapping[str, str]) -> None:
    """Refuse runs whose jobs would end before training starts.

    Raises:
        UserError: what is missing, one line for each.
    """
    faults: dict[str, str] = {}

    def check(require: Callable[[], None]) -> None:
        try:
            require()
        except UserError as error:
            faults.setdefault(error.problem, error.remedy)

    check(functools.partial(require_image, site, settings))
    for experiment in experiments:
        if _has_started(run_for(experiment, site)):  # it checks itself whether what it began with is still there
            continue
        for require in (require_model, require_data, require_warm_start):
            check(functools.partial(require, experiment, site))
    if faults:
        remedies = " ".join(dict.fromkeys(filter(None, faults.values())))
        raise UserError("\n".join(faults), f"Nothing was submitted. {remedies}")


def _has_started(run: Run) -> bool:
    return run.data.exists()


# What the partition allows.


def _node_request(spec: JobSpec) -> NodeKind:
    """Return what a job asks of each of its nodes; memory is 0 for all of a node, or if the site decides."""
    cpus = spec.cpus * max(1, spec.gpus)
    memory = _mebibytes(spec.mem) + _mebibytes(spec.mem_per_cpu) * cpus + _mebibytes(spec.mem_per_gpu) * spec.gpus
    return NodeKind(cpus, memory, spec.gpus)


def _mebibytes(text: str | None) -> float:
    """Return a size in Slurm's notation in MiB; 0 for none, and for what is no size."""
    found = re.fullmatch(r"([0-9.]+)([KMGT]?)B?", str(text or "0").upper())
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def check_limits(spec: JobSpec, slurm: Slurm) -> None:
    """Refuse a request that every partition that it names rules out, by its limits or those of QOS and association.

    What cannot be read counts as allowed.

    Raises:
        UserError: the limit, and the key to change.
    """
    partitions, nodes = slurm.partitions()
    if not partitions:
        return
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    named = spec.partition.split(",") if spec.partition else default
    faults = [
        _fault(spec, name, partitions.get(name), nodes.get(name, []), partitions)
        or _accounting_fault(spec, slurm.job_limits(spec.account, name, spec.qos, partitions[name].get("QoS")))
        for name in named
    ]
    if faults and all(faults):
        raise UserError("\n".join(dict.fromkeys(faults)), "Slurm would never start this job; nothing was submitted.")


def _fault(
    spec: JobSpec,
    name: str,
    facts: Mapping[str, str] | None,
    nodes: Sequence[NodeKind],
    partitions: Mapping[str, object],
) -> str:
    """Return why a partition cannot run a job; "" if it can, or if that is not known."""
    where = f"partition {name}"
    if facts is None:
        return f"job.partition: there is no partition {name}; there are {', '.join(partitions)}"
    if facts.get("State", "UP") not in ("UP", "DRAIN"):
        return f"{where} is {facts['State']}: it starts no jobs now; choose another job.partition"
    limit = facts.get("MaxTime", "UNLIMITED")
    if limit[0].isdigit() and spec.minutes > minutes_of(limit) and not spec.qos:
        return f"job.time: {spec.minutes} minutes; {where} allows {limit}. A run that needs longer requeues itself"
    for key in ("MaxNodes", "TotalNodes"):
        if facts.get(key, "").isdigit() and spec.nodes > int(facts[key]) and not spec.qos:
            return f"job.nodes: {spec.nodes}; {where} has {key}={facts[key]}"
    for allowed, value, field in (("AllowAccounts", spec.account, "account"), ("AllowQos", spec.qos, "qos")):
        names = facts.get(allowed, "ALL")
        if value and names != "ALL" and value.lower() not in names.lower().split(","):
            return f"job.{field}: {value}; {where} allows only {names}"
    groups = facts.get("AllowGroups", "ALL")
    if groups != "ALL" and os.geteuid() and not set(groups.split(",")) & set(_own_groups()):
        return f"{where} is for the groups {groups}; choose another job.partition"
    wanted = _node_request(spec)
    for key, option, amount in (("MaxMemPerNode", "mem", wanted.memory), ("MaxCPUsPerNode", "cpus", wanted.cpus)):
        if facts.get(key, "").isdigit() and amount > int(facts[key]):
            return f"job.{option}: {amount:g}; {where} has {key}={facts[key]}"
    for field in ("cpus", "memory", "gpus"):
        most = max((getattr(node, field) for node in nodes), default=0)
        if nodes and getattr(wanted, field) > most:
            key = {"cpus": "job.cpus (times job.gpus)", "memory": "job.mem", "gpus": "job.gpus"}[field]
            unit = " MiB" if field == "memory" else ""
            return f"{key}: {getattr(wanted, field):g}{unit} on a node; nodes of {where} have at most {most:g}{unit}"
    if nodes and not any(_fits(wanted, node) for node in nodes):
        return f"no node of {where} has {wanted.cpus} CPUs, {wanted.memory:g} MiB and {wanted.gpus} GPUs together"
    return ""


def _accounting_fault(spec: JobSpec, limits: Sequence[JobLimit]) -> str:
    """Return which limit of a QOS or association a job exceeds; "" if it exceeds none."""
    node = _node_request(spec)
    gpus, typed = float(spec.nodes * node.gpus), f"gres/gpu:{spec.gpu_type}" if spec.gpu_type else "gres/gpu"
    wanted = {
        "cpu": ("cpus", float(spec.nodes * node.cpus)),
        "mem": ("mem", spec.nodes * node.memory),
        "node": ("nodes", float(spec.nodes)),
        "gres/gpu": ("gpus", gpus),
        typed: ("gpus", gpus),
    }
    for one in limits:
        if one.resource == "time":
            if one.amount[0].isdigit() and spec.minutes > minutes_of(one.amount):
                told = f"{one.where} allows {one.amount} ({one.limit}). A run that needs longer requeues itself"
                return f"job.time: {spec.minutes} minutes; {told}"
            continue
        field, amount = wanted.get(one.resource, ("", 0.0))
        if amount > _mebibytes(one.amount):
            unit = " MiB" if field == "mem" else ""
            return f"job.{field}: {amount:g}{unit} in all; {one.where} has {one.limit} {one.resource}={one.amount}"
    return ""


def _fits(wanted: NodeKind, node: NodeKind) -> bool:
    return wanted.cpus <= node.cpus and wanted.memory <= node.memory and wanted.gpus <= node.gpus


def _own_groups() -> Iterator[str]:
    for number in os.getgroups():
        try:
            yield grp.getgrgid(number).gr_name
        except KeyError:
            continue


# sbatch --test-only.


def request_options(spec: JobSpec) -> list[str]:
    """Return the options of sbatch for a job's request."""
    parameters = spec.parameters([], None)
    wanted = {name.replace("_", "-"): parameters[name] for name in _REQUESTED if parameters.get(name)}
    wanted |= parameters["additional_parameters"]
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items()]


def try_request(options: Sequence[str], environment: Mapping[str, str]) -> tuple[bool | None, str]:
    """Ask `sbatch --test-only`, which looks at partition, account, limits and nodes, and submits nothing.

    Returns:
        Whether Slurm would take the job, None if it does not answer; and its words.
    """
    command = ["sbatch", "--test-only", *options, "--wrap", "true"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None, f"sbatch does not answer within {TEST_SECONDS} s"
    words = " ".join(done.stderr.replace("sbatch: ", "").split())
    return done.returncode == 0, words or ("would be taken" if done.returncode == 0 else "refused")


def check_request(spec: JobSpec, slurm: Slurm) -> None:
    """Compare a request with the partition's limits, and report what `sbatch --test-only` objects to.

    Raises:
        UserError: it can never start.
    """
    check_limits(spec, slurm)
    taken, words = try_request(request_options(spec), clean_environment(os.environ))
    if taken is False:
        log.warning(f"sbatch --test-only: {words}; submitting all the same ({shlex.join(request_options(spec))})")
