"""Checks of a machine: Python and packages, GPUs, InfiniBand, storage, permissions, Slurm and the image."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shlex
import shutil
import site
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.schema import Config
from ftlib.core import files, permissions, trust
from ftlib.core import infiniband as core_infiniband
from ftlib.core.gpu import REMEDY, find_mismatch
from ftlib.core.paths import REPOSITORY, Site, find_site, site_settings
from ftlib.core.permissions import RECORD_FOLDERS, STICKY_FOLDERS, Sharing
from ftlib.core.redaction import redact
from ftlib.core.text import format_gib, format_size
from ftlib.errors import UserError
from ftlib.slurm import requirements
from ftlib.slurm.client import Slurm, clean_environment, is_away
from ftlib.slurm.image import container_program, read_labels
from ftlib.slurm.jobspec import JobSpec

# The outcome of a check, and asking programs of the system.


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome; `remedy` is empty when nothing is to be done."""

    check: str
    state: str
    remedy: str = ""
    fatal: bool = False


def program_output(*command: str) -> str | None:
    """What a program prints; None if it fails or does not answer within 20 s."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError):
        return None


def inside_container() -> str | None:
    """The image that this process runs in."""
    return os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")


# Slurm, whether it would take our jobs, and the image.


def slurm() -> Iterator[CheckResult]:
    """Does it answer, and would it take a job with this site's account and partition?"""
    if "SLURM_JOB_ID" in os.environ:
        where = f"partition {os.environ.get('SLURM_JOB_PARTITION', '?')}, node {os.environ.get('SLURMD_NODENAME', '?')}"
        yield CheckResult("Slurm", f"inside job {os.environ['SLURM_JOB_ID']}, {where}")
    elif inside_container():
        yield CheckResult("Slurm", "not looked for inside the container")
    elif not shutil.which("sinfo"):
        yield CheckResult("Slurm", "sinfo is not in PATH", "Without it: ftlib train, or ftlib submit --executor local.")
    elif (answer := program_output("sinfo", "-h", "-o", "%P")) is None:
        yield CheckResult("Slurm", "does not answer", "Ask your site whether slurmctld is down.", fatal=True)
    else:
        yield CheckResult("Slurm", f"partitions {', '.join(answer.split())}")
        settings = site_settings()
        own = {name: value for name, value in settings.items() if name.startswith("SBATCH_")}
        yield _try_job("job", [], {**clean_environment(settings), **own})
        if program_output("sacct", "-n", "-X", "-S", "now-1minutes") is None:
            yield CheckResult(
                "accounting", "sacct does not answer", "status then tells only what run folders and squeue know."
            )


def job(config: Config) -> Iterator[CheckResult]:
    """Would Slurm take this config's job?"""
    if not shutil.which("sbatch") or "SLURM_JOB_ID" in os.environ:
        return
    settings = site_settings()
    spec = JobSpec.of(config, settings)
    try:
        requirements.check_limits(spec, Slurm())
    except UserError as error:
        yield CheckResult("config's job", error.problem, "Change it: Slurm would never start this job.", fatal=True)
    yield _try_job("config's job", requirements.request_options(spec), clean_environment(settings))


def _try_job(check: str, options: Sequence[str], environment: Mapping[str, str]) -> CheckResult:
    taken, words = requirements.try_request(options, environment)
    if taken is None or is_away(words):
        return CheckResult(check, words, "Wait until slurmctld responds; if it stays away, ask your site.", fatal=True)
    if taken:
        return CheckResult(check, words)
    remedy = "Set SBATCH_ACCOUNT, SBATCH_PARTITION and the like in jobs/site.env, or the config's job: section."
    return CheckResult(check, f"Slurm refuses it: {words}", remedy, fatal=True)


def image() -> Iterator[CheckResult]:
    """Is the image there, and is it ours?"""
    if inside := inside_container():
        yield CheckResult("image", f"inside {inside}")
        return
    settings = site_settings()
    if settings.get("FTLIB_RUNTIME") == "none":
        yield _runtime_without_container(settings.get("FTLIB_VENV"))
        return
    path = requirements.image_path(find_site(), settings)
    program = container_program()
    build = "Build it: sbatch jobs/build.sbatch"
    if program is None:
        yield CheckResult(
            "container", "neither apptainer nor singularity is in PATH", "Load its module, or train without."
        )
    elif not path.exists():
        yield CheckResult("image", f"{path} is not there", build)
    elif (labels := read_labels(program, path)) is None:
        yield CheckResult("image", f"{path} is no image of ftlib", build, fatal=True)
    else:
        versions = dict(labels.packages)
        told = {
            "ftlib": labels.revision,
            "base": labels.base,
            "digest": labels.base_digest,
            "lock": labels.lock,
            "GPU architectures": " ".join(labels.architectures),
            "packages": str(len(versions) or ""),
            **{name: versions.get(name, "") for name in ("torch", "transformers", "peft")},
        }
        yield CheckResult("image", f"{path}: {', '.join(f'{name} {value}' for name, value in told.items() if value)}")


def _runtime_without_container(venv: str | None) -> CheckResult:
    where = f"FTLIB_VENV={venv}" if venv else "python3 in PATH after FTLIB_HOOK"
    if venv and not os.access(Path(venv) / "bin" / "python3", os.X_OK):
        return CheckResult("runtime", f"{where} has no bin/python3", "Create it with: python3 -m venv", fatal=True)
    return CheckResult("runtime", f"no container: {where}")


_SECRET = re.compile(r"TOKEN|KEY|PASS|SECRET|CREDENTIAL|INDEX_URL|ENDPOINT")
_SHOWN_PACKAGES = ("ftlib", "submitit", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


def ticket() -> str:
    """Return facts to paste into a support ticket: versions, Slurm, partitions, image and settings, without secrets."""
    image_path = site_settings().get("FTLIB_IMAGE") or str(find_site().store / "images" / "ftlib.sif")
    program = shutil.which("apptainer") or shutil.which("singularity")
    commands = {
        "Slurm": ("sinfo", "--version"),
        "partitions": ("scontrol", "show", "partition", "-o"),
        "container": (program or "apptainer", "--version"),
        "image labels": (program or "apptainer", "inspect", "--labels", image_path),
    }
    lines = ["```", f"Python: {platform.python_version()}, {platform.platform()}"]
    lines.append(f"packages: {', '.join(filter(None, map(_installed, _SHOWN_PACKAGES)))}")
    for name, line in commands.items():
        answer = (program_output(*line) or "no answer").strip()
        lines += (
            [f"{name}:", *(f"  {part}" for part in answer.splitlines())] if "\n" in answer else [f"{name}: {answer}"]
        )
    settings = site_settings()
    named = sorted(name for name in settings if name.startswith(("FTLIB_", "SBATCH_", "HF_", "BASE", "INDEX_", "CA_")))
    lines += [f"{name}={'(set)' if _SECRET.search(name) else settings[name]}" for name in named]
    return redact("\n".join([*lines, "```"]))


def _installed(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


# GPUs: does torch see those that Slurm gave, suit driver and torch, do they compute, and in bfloat16?

_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""CUDA's major version → the oldest branch of the driver that runs it (NVIDIA, CUDA Compatibility, minor versions)."""


def gpus() -> Iterator[CheckResult]:
    """All of it, where torch is installed; a login node has no GPU and needs none."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    promised = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    seen = torch.cuda.device_count()
    if promised > seen:
        yield CheckResult("GPU", f"Slurm gave {promised}, torch sees {seen}", _why_invisible(torch), fatal=True)
    elif not seen:
        yield CheckResult("GPU", "none was asked for" if "SLURM_JOB_ID" in os.environ else "none here")
    for index in range(seen):
        yield _check_gpu(torch, index)


def _why_invisible(torch: Any) -> str:
    """What keeps torch from the GPU."""
    if not Path("/dev/nvidiactl").exists():
        return "No NVIDIA device is in here: start the container with --nv (jobs/run.sh does), on a node with a driver."
    if torch.version.cuda is None:
        return "This torch is built for the CPU only: build the image from one with CUDA (BASE= in jobs/site.env)."
    driver = (
        (program_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "")
        .split("\n")[0]
        .strip()
    )
    needed = _DRIVERS.get(torch.version.cuda.partition(".")[0], 0)
    if not driver:
        return "nvidia-smi does not answer: ask your site whether the node's driver is in order."
    if driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) < needed:
        built = f"torch is built for CUDA {torch.version.cuda}, which needs driver {needed} or newer; this is {driver}."
        return f"{built} Build the image from an older base (BASE= in jobs/site.env)."
    return f"Driver {driver} suits CUDA {torch.version.cuda}: look at CUDA_VISIBLE_DEVICES, and at the site's cgroups."


def _check_gpu(torch: Any, index: int) -> CheckResult:
    """Let it compute; ask for bfloat16 in hardware."""
    check = f"GPU {index}"
    try:
        if fault := find_mismatch(torch, index):
            return CheckResult(check, fault, REMEDY, fatal=True)
        facts = torch.cuda.get_device_properties(index)
        total = torch.ones(256, device=f"cuda:{index}").sum().item()
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        remedy = "Ask your site about this node; meanwhile: sbatch --exclude=NODE."
        return CheckResult(check, f"does not compute: {str(error).splitlines()[0]}", remedy, fatal=True)
    state = f"{facts.name}, {format_gib(facts.total_memory, 0)}, CUDA {torch.version.cuda}"
    if total != 256:
        return CheckResult(check, f"{state}: adds wrongly", "Ask your site about this node.", fatal=True)
    remedy = "No bfloat16 here: use training.fp16, or training.precision: auto." if not bf16 else ""
    return CheckResult(check, f"{state}, {'with' if bf16 else 'without'} bfloat16", remedy)


_LITTLE_MEMLOCK = 1 << 30


def infiniband(root: Path = Path("/")) -> Iterator[CheckResult]:
    """Can NCCL use the InfiniBand or RoCE devices of this node, if there are any?"""
    devices = core_infiniband.active_devices(root)
    if not devices:
        return
    names = ", ".join(devices)
    if fault := core_infiniband.find_obstacle(root):
        yield CheckResult("InfiniBand", f"{names}, but NCCL would use sockets: {fault}", core_infiniband.REMEDY)
    else:
        yield CheckResult("InfiniBand", f"{names}, with libibverbs and providers")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < _LITTLE_MEMLOCK:
        remedy = "NCCL may fail to register memory. Ask your site for an unlimited memlock in jobs (slurmd's limits)."
        yield CheckResult("memlock", f"at most {format_size(limit)} of locked memory", remedy)
    else:
        yield CheckResult("memlock", "enough memory can be locked")


# Python, packages, the hub's token.


def python() -> Iterator[CheckResult]:
    """Its version."""
    old = sys.version_info < (3, 10)
    yield CheckResult("Python", platform.python_version(), "ftlib needs Python 3.10 or newer." if old else "", old)


def packages() -> Iterator[CheckResult]:
    """Versions of what training needs."""
    missing = []
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            yield CheckResult(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        remedy = "A login node needs none of them. To train here: pip install 'ftlib[train]'."
        yield CheckResult("packages", f"{', '.join(missing)} not installed", remedy)


_WITHOUT_TORCHVISION = ("Gemma3Processor", "Idefics3Processor")
"""Processors of images that need no torchvision; those with a video part, Pixtral's and LFM2-VL's do."""
_WITH_NUM2WORDS = ("SmolVLMProcessor",)


def processor_packages(config: Config, folder: Path) -> Iterator[CheckResult]:
    """Has this machine (without torch: the image) the packages that the model's processor imports?

    Args:
        folder: of the model.
    """
    settings = (folder / name for name in ("processor_config.json", "preprocessor_config.json"))
    found = [files.read_json(path).get("processor_class") for path in settings if path.is_file()]
    kind = next(filter(None, found), "")
    if not config.model.entry.auto_processor or not kind:
        return
    needed = ["torchvision"] * (kind not in _WITHOUT_TORCHVISION) + ["num2words"] * (kind in _WITH_NUM2WORDS)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("torch") is None:
        program, path = container_program(), requirements.image_path(find_site(), site_settings())
        labels = read_labels(program, path) if program and path.exists() else None
        if labels and (missing := [name for name in needed if name not in dict(labels.packages)]):
            remedy = "Build it again, from a base that has torchvision: sbatch jobs/build.sbatch"
            yield CheckResult("processor", f"{kind} needs {' and '.join(missing)}, not in {path}", remedy, fatal=True)
        return
    fault = f"{' and '.join(missing)}, not installed" if missing else ""
    if not fault and "torchvision" in needed:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:  # built for another torch
            why = f"{error}".partition("\n")[0]
            fault, missing = f"torchvision, which cannot be imported: {why}", ["torchvision"]
    if fault:
        yield CheckResult("processor", f"{kind} needs {fault}", f"Run: {_install_line(missing)}", fatal=True)
    elif needed:
        yield CheckResult("processor", f"{kind}: {', '.join(map(_installed, needed))}")


def _install_line(packages: Sequence[str]) -> str:
    """pip's arguments; torchvision 0.N belongs to torch 2.(N - 15), and to the same build of it."""
    version, _, build = importlib.metadata.version("torch").partition("+")
    minor = int(version.split(".")[1]) + 15
    names = [f"'torchvision==0.{minor}.*'" if name == "torchvision" else name for name in packages]
    index = (
        f" --extra-index-url https://download.pytorch.org/whl/{build}" if build and "torchvision" in packages else ""
    )
    return f"pip install {' '.join(names)}{index}"


def user_packages() -> Iterator[CheckResult]:
    """Packages in the home folder win over those of the image."""
    folder = Path(site.getusersitepackages())
    shadows = [name for name in ("torch", "transformers", "peft", "numpy", "pydantic") if (folder / name).exists()]
    if not shadows or os.environ.get("PYTHONNOUSERSITE"):
        yield CheckResult("packages in ~/.local", "none that would shadow others")
    else:
        remedy = "export PYTHONNOUSERSITE=1 (jobs/run.sh does)."
        yield CheckResult("packages in ~/.local", f"{', '.join(shadows)} in {folder} win over others", remedy)


def token() -> Iterator[CheckResult]:
    """Whether others can read the hub's token, or see it in the environment of processes."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    if not path.exists():
        yield CheckResult("hub token", "none (needed only for gated models)")
    elif path.stat().st_mode & 0o077:
        yield CheckResult("hub token", f"{path} can be read by others", f"chmod 600 {path}", fatal=True)
    else:
        yield CheckResult("hub token", f"{path} is private")
    if os.environ.get("HF_TOKEN"):
        remedy = (
            "Write it to a file of mode 0600 with `hf auth login` and unset HF_TOKEN: jobs inherit the environment."
        )
        yield CheckResult("HF_TOKEN", "is set in the environment", remedy)


def hub_access() -> Iterator[CheckResult]:
    """Whether the hub is asked at all."""
    state = "off: models come from the store" if os.environ.get("HF_HUB_OFFLINE") == "1" else "on (jobs turn it off)"
    yield CheckResult("hub access", state)


# Store, runs and local temporary folder: writable, roomy, quick, and on time.

_PROBE_BYTES = 32 << 20
_SLOW = 20e6
"""Bytes a second; a checkpoint of 6 GB would take five minutes, longer than what Slurm leaves after its signal."""

_SKEW_SECONDS = 5.0
_LITTLE_BYTES = 5e9
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "wekafs", "panfs")


def roots() -> Iterator[CheckResult]:
    """Both roots: writable? how much is free? how fast? does their clock agree with this machine's?"""
    try:
        site = find_site()
        permissions.open_runs(site)
        for name, folder in (("store", site.store), ("runs", site.runs)):
            probe = folder / f".doctor-{uuid.uuid4().hex}"
            files.write_text(probe, "")
            probe.unlink()
            free = shutil.disk_usage(folder).free
            yield CheckResult(name, f"{folder} is writable, {format_size(free)} free")
            yield from _speed_and_clock(name, folder)
    except UserError as error:
        yield CheckResult("store", error.problem, error.remedy, fatal=True)


def _speed_and_clock(name: str, folder: Path) -> Iterator[CheckResult]:
    with files.storage_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        before = time.time()
        file.write(os.urandom(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        seconds = time.time() - before
        skew = os.fstat(file.fileno()).st_mtime - time.time()
    speed = _PROBE_BYTES / max(seconds, 1e-6)
    remedy = "Checkpoints will be slow: save less often (checkpoint.steps), or ask your site for faster storage."
    yield CheckResult(f"{name} speed", f"{speed / 1e6:.0f} MB/s written", remedy if speed < _SLOW else "")
    if abs(skew) > _SKEW_SECONDS:
        remedy = "Ask your site to set the clocks; times in logs and histories cannot be compared between machines."
        yield CheckResult(f"{name} clock", f"the storage is {skew:+.0f} s off this machine's clock", remedy)
    else:
        yield CheckResult(f"{name} clock", "agrees with this machine's")


def local_temporary() -> Iterator[CheckResult]:
    """Where compile caches and temporary files go: a local disk with some room."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    kind = _file_system(folder)
    state = f"{folder} ({kind}), {format_size(free)} free"
    if kind in _NETWORK:
        yield CheckResult("temporary", state, "It is on the network: set FTLIB_TMP in jobs/site.env to a local disk.")
    elif free < _LITTLE_BYTES:
        what = "It is in memory and small" if kind == "tmpfs" else "There is little room"
        yield CheckResult("temporary", state, f"{what}: set FTLIB_TMP in jobs/site.env to a local disk.")
    else:
        yield CheckResult("temporary", state)


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, by the longest mount point above it (proc(5), mounts)."""
    found = ("", "unknown")
    real = str(folder.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


# Who may use the store and change what is run: judged by owners, groups and modes, not by what this user may do.

_ENTRIES = 200_000
"""Of the store that are looked at: each is a question to the storage."""


def sharing() -> Iterator[CheckResult]:
    """Can every member of the store's group use it, and nobody replace what is another's?"""
    site = find_site()
    if not site.store.is_dir():
        return
    who = permissions.store_sharing(site.store)
    if who.group is None:
        remedy = "To share it, set FTLIB_GROUP in jobs/site.env; doctor then tells the commands."
        yield CheckResult("sharing", f"nobody but {_owner(site.store)} can write to {site.store}", remedy)
        return
    group = permissions.group_name(who.group)
    yield CheckResult("sharing", f"{site.store} is shared with the group {group}")
    for name in ("", *STICKY_FOLDERS, *RECORD_FOLDERS):
        folder = site.store / name
        if folder.is_dir() and (fix := permissions.repair_commands(folder, who.mode(name), who.group)):
            yield CheckResult("permissions", f"{folder} is {_shown(folder)}", f"{_owner(folder)} or root: {fix}")
    yield from _content(site, who)


def _content(site: Site, who: Sharing) -> Iterator[CheckResult]:
    """What another member cannot read, and what is of another group: what was moved or copied there keeps its own."""
    assert who.group is not None
    name = permissions.group_name(who.group)
    faults: dict[str, tuple[str, Callable[[os.stat_result], bool], str]] = {
        "group": (f"not of the group {name}", lambda facts: not permissions.belongs_to_group(facts, who.group or 0),
                  f"find STORE -path STORE/runs -prune -o ! -group {name} -exec chgrp -h {name} {{}} +"),
        "setgid": ("folders that do not hand their group down",
                   lambda facts: stat.S_ISDIR(facts.st_mode) and not facts.st_mode & stat.S_ISGID,
                   "find STORE -path STORE/runs -prune -o -type d ! -perm -2000 -exec chmod g+s {} +"),
        "readable": ("not readable by the group", _unreadable,
                     "find STORE -path STORE/runs -prune -o ! -perm -0040 -exec chmod g+rX {} +"),
        "others": ("writable by everybody", lambda facts: not stat.S_ISLNK(facts.st_mode) and bool(facts.st_mode & 2),
                   "find STORE -path STORE/runs -prune -o -perm -0002 ! -type l -exec chmod o-w {} +"),
    }  # fmt: skip
    found: dict[str, list[Path]] = {kind: [] for kind in faults}
    for seen, path in enumerate(_walk(site.store), 1):
        facts = path.lstat()
        for kind, (_, wrong, _) in faults.items():
            if wrong(facts):
                found[kind].append(path)
        if seen == _ENTRIES:
            yield CheckResult("store's files", f"only the first {seen} were looked at")
            break
    for kind, paths in found.items():
        if paths:
            what, _, fix = faults[kind]
            owners = sorted({_owner(path) for path in paths})
            told = f"{len(paths)} {what}, of {', '.join(owners[:3])}{', …' if len(owners) > 3 else ''}: {paths[0]}"
            yield CheckResult(
                "store's files", told, f"Their owners or root: {fix.replace('STORE', shlex.quote(str(site.store)))}"
            )


def _unreadable(facts: os.stat_result) -> bool:
    wanted = 0o050 if stat.S_ISDIR(facts.st_mode) else 0o040
    return not stat.S_ISLNK(facts.st_mode) and facts.st_mode & wanted != wanted


def _walk(store: Path) -> Iterator[Path]:
    """All in the store's folders, but those themselves, runs, and caches, each of which is one user's."""
    for name in sorted({*STICKY_FOLDERS, *RECORD_FOLDERS} - {"runs", "cache"}):
        for place, folders, names in os.walk(store / name):
            folders[:] = [each for each in folders if not (Path(place) == store / "hf" and each in ("hub", "staging"))]
            yield from (Path(place, each) for each in (*folders, *names))


def runs() -> Iterator[CheckResult]:
    """Can others read or change this user's runs?"""
    site = find_site()
    if not site.runs.is_dir():
        return
    mode = permissions.private_mode(site)
    state = "readable by the store's group" if mode & 0o040 else "private"
    folders = [path.parent for path in sorted(site.runs.glob("[!.]*/*/config.yaml"))]
    own = [site.runs, *dict.fromkeys(each for folder in folders for each in (folder.parent, folder))]
    other = [folder for folder in own if _rights(folder) != mode & 0o777]
    jobs = site.runs / ".jobs"
    if jobs.is_dir() and _rights(jobs) != 0o700:
        yield CheckResult("runs", f"{jobs} is {_shown(jobs)}", f"chmod 700 {shlex.quote(str(jobs))}")
    if other:
        group = permissions.store_sharing(site.store).group
        chgrp = f"chgrp -R {permissions.group_name(group)} PLACE && " if mode & 0o040 and group is not None else ""
        root = shlex.quote(str(site.runs))
        places = f"{root} {root}/*/ {root}/*/*/" if folders else root
        fix = f"{chgrp}chmod {mode & 0o777 | 0o2000 * bool(chgrp):o} PLACE".replace("PLACE", places)
        yield CheckResult("runs", f"{len(other)} folders are not {state}: {other[0]} is {_shown(other[0])}", fix)
    else:
        yield CheckResult("runs", f"{site.runs} is {state}")


def executed() -> Iterator[CheckResult]:
    """Could anybody else have written what is executed?"""
    site, settings = find_site(), site_settings()
    image = requirements.image_path(site, settings)
    looked_at = {
        "jobs/site.env": REPOSITORY / "jobs" / "site.env",
        "FTLIB_HOOK": Path(settings["FTLIB_HOOK"]) if settings.get("FTLIB_HOOK") else None,
        "the image": None if inside_container() else image,
        "the code of jobs": site.runs / ".jobs",
    }
    there = [(what, path) for what, path in looked_at.items() if path and path.exists()]
    there += [("the code of a run", path) for path in sorted(site.runs.glob("[!.]*/*/code"))]
    there += [("what was submitted", path) for path in sorted({path.parent for path in Path().glob("logs/*/*.pkl")})]
    fine = True
    for what, path in there:
        try:
            permissions.require_trusted(path, what, site)
        except UserError as error:
            fine = False
            yield CheckResult("code", error.problem, error.remedy, fatal=True)
    if fine:
        yield CheckResult("code", "what is executed can be changed by nobody else")
    if (wanted := settings.get("FTLIB_IMAGE_SHA256")) and image.exists() and not inside_container():
        yield CheckResult("image", f"pinned to {wanted[:12]}…; compared at every start")


def _rights(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


def _owner(path: Path) -> str:
    return trust.user_name(path.lstat().st_uid)


def _shown(folder: Path) -> str:
    facts = folder.stat()
    return f"{stat.S_IMODE(facts.st_mode):o}, {_owner(folder)}'s, of the group {permissions.group_name(facts.st_gid)}"
