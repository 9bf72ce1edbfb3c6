"""Slurm, whether it would take our jobs, and the image."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ftlib.config import Config
from ftlib.diagnosis.finding import Finding, ask, inside_container
from ftlib.site import find_site, site_settings
from ftlib.submission.jobspec import JobSpec
from ftlib.submission.slurm import scrubbed

_REQUESTED = ("time", "nodes", "ntasks_per_node", "cpus_per_task", "mem", "gres", "gpus_per_node", "partition",
              "account", "qos", "constraint", "exclude")  # fmt: skip


def slurm() -> Iterator[Finding]:
    """Does it answer, and would it take a job with this site's account and partition?"""
    if "SLURM_JOB_ID" in os.environ:
        where = f"partition {os.environ.get('SLURM_JOB_PARTITION', '?')}, node {os.environ.get('SLURMD_NODENAME', '?')}"
        yield Finding("Slurm", f"inside job {os.environ['SLURM_JOB_ID']}, {where}")
    elif inside_container():
        yield Finding("Slurm", "not looked for inside the container")
    elif not shutil.which("sinfo"):
        yield Finding("Slurm", "sinfo is not in PATH", "Without it: ftlib train, or ftlib submit --executor local.")
    elif (answer := ask("sinfo", "-h", "-o", "%P")) is None:
        yield Finding("Slurm", "does not answer", "Ask your site whether slurmctld is down.", fatal=True)
    else:
        yield Finding("Slurm", f"partitions {', '.join(answer.split())}")
        settings = site_settings()
        own = {name: value for name, value in settings.items() if name.startswith("SBATCH_")}
        yield _try_job("job", [], {**scrubbed(settings), **own})
        if ask("sacct", "-n", "-X", "-S", "now-1minutes") is None:
            yield Finding(
                "accounting", "sacct does not answer", "status then tells only what run folders and squeue know."
            )


def job(config: Config) -> Iterator[Finding]:
    """Would Slurm take this config's job?"""
    if not shutil.which("sbatch") or "SLURM_JOB_ID" in os.environ:
        return
    settings = site_settings()
    parameters = JobSpec.of(config, settings).parameters([], None)
    wanted = {name.replace("_", "-"): parameters[name] for name in _REQUESTED if parameters.get(name)}
    wanted |= parameters["additional_parameters"]
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items()]
    yield _try_job("config's job", options, scrubbed(settings))


def _try_job(check: str, options: Sequence[str], environment: Mapping[str, str]) -> Finding:
    """sbatch --test-only looks at partition, account, limits and nodes, and submits nothing."""
    command = ["sbatch", "--test-only", *options, "--wrap", "true"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(check, "sbatch does not answer", "Ask your site whether slurmctld is down.", fatal=True)
    words = " ".join(done.stderr.replace("sbatch: ", "").split())
    if done.returncode == 0:
        return Finding(check, words or "would be taken")
    remedy = "Set SBATCH_ACCOUNT, SBATCH_PARTITION and the like in jobs/site.env, or the config's job: section."
    return Finding(check, f"Slurm refuses it: {words}", remedy, fatal=True)


def image() -> Iterator[Finding]:
    """Is the image there, and is it ours?"""
    if inside := inside_container():
        yield Finding("image", f"inside {inside}")
        return
    path = Path(site_settings().get("FTLIB_IMAGE") or find_site().store / "images" / "ftlib.sif")
    program = shutil.which("apptainer") or shutil.which("singularity")
    build = "Build it: sbatch jobs/build.sbatch"
    if program is None:
        yield Finding("container", "neither apptainer nor singularity is in PATH", "Load its module, or train without.")
    elif not path.exists():
        yield Finding("image", f"{path} is not there", build)
    elif "org.ftlib.revision" not in (labels := ask(program, "inspect", "--labels", str(path)) or ""):
        yield Finding("image", f"{path} is no image of ftlib", build, fatal=True)
    else:
        wanted = [line for line in labels.splitlines() if line.startswith("org.ftlib")]
        yield Finding("image", f"{path}: {', '.join(wanted)}")
