"""A user's view of the test cluster: a clone of the repository, a store with the image, sbatch and sacct.

The tests need root (to become the ordinary user) and a running cluster (`tests/cluster/up.sh`). Without one they are
skipped with that reason; under CI that is a failure. They see the machine as it is.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import files, jsonl
from tests import isolation, needs
from tests.conftest import REPOSITORY

USER, MEMBER = "ftuser", "ftmember"
"""An ordinary user, and a second one of the same group."""
STATE = Path(os.environ.get("FTLIB_CLUSTER_STATE", "/var/lib/ftlib-cluster"))
NEWER = STATE / "slurm-24.11"
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")


@dataclass
class Cluster:
    """What the ordinary user has."""

    home: Path
    jobs: list[str] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.home / "shared store"  # with a space, as some sites have it

    @property
    def image(self) -> Path:
        return self.store / "images" / "ftlib.sif"

    @property
    def login(self) -> Path:
        """The login node's Python."""
        return STATE / "login" / "bin" / "python"

    def shell(self, command: str, user: str = USER, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run a shell command as the user, or as another one with the same primary group, in the user's clone."""
        settings = {"FTLIB_STORE": self.store, "OMP_NUM_THREADS": 1, "HOME": f"/home/{USER}", **environment}
        exports = "".join(f"export {name}='{value}'; " for name, value in settings.items() if value is not None)
        script = f"cd '{self.home}/ftlib'; {exports}{command}"
        as_user = ["runuser", "-u", user, "-g", USER, "--"]
        return subprocess.run([*as_user, "bash", "-c", script], capture_output=True, text=True)

    def ftlib(self, arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run a command as the user on the login node, where there is no torch."""
        return self.shell(f"'{self.login.parent}/ftlib' {arguments}", **environment)

    def submit(self, arguments: str, **environment: object) -> list[str]:
        """Submit through ftlib and return the numbers of the jobs and arrays."""
        done = self.ftlib(f"submit {arguments}", **environment)
        assert done.returncode == 0, done.stderr
        found = done.stdout.split()
        self.jobs += found
        return found

    def sbatch(self, arguments: str, **environment: object) -> str:
        """Submit and return the job's number."""
        done = self.shell(f"sbatch --parsable --mem=2500M --cpus-per-task=1 {arguments}", **environment)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def state(self, job: str) -> str:
        """The newest state of a job; empty before accounting knows it."""
        done = subprocess.run(["sacct", "-nXPo", "State", "-j", job], capture_output=True, text=True)
        return done.stdout.split()[0] if done.stdout.strip() else ""

    def kill_step(self, job: str, name: str) -> None:
        """Send SIGKILL to the processes of a job's running step, which has the name of its command."""
        shown = subprocess.run(
            ["squeue", "--noheader", "--steps", "--jobs", job, "-o", "%i %j"],
            capture_output=True,
            text=True,
            check=True,
        )
        (step,) = [line.split()[0] for line in shown.stdout.splitlines() if line.split()[1] == name]
        assert self.shell(f"scancel --signal=KILL {step}").returncode == 0

    def wait(self, job: str, seconds: float = 400) -> str:
        """Wait until a job has ended for good and return its state."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.state(job)
            if state.startswith(FINISHED):
                return state
            time.sleep(1)
        raise AssertionError(f"job {job} is {self.state(job)} after {seconds} s\n{self.log(job)}")

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 200) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s for {what}"
            time.sleep(0.2)

    def log(self, job: str) -> str:
        """What a job has printed."""
        return "".join(path.read_text() for path in (self.home / "ftlib").glob(f"*-{job}.log"))

    def run(self, name: str, runs: Path | None = None) -> Path:
        """The only run folder of a name."""
        (folder,) = ((runs or self.store / "runs" / USER) / name).iterdir()
        return folder

    def steps(self, name: str, runs: Path) -> int:
        """How many steps a run has logged; 0 before it began."""
        logs = list((runs / name).glob("*/metrics.jsonl"))
        return len(jsonl.read_jsonl_log(logs[0])) if logs else 0


@pytest.fixture(scope="package", autouse=True)
def machine() -> Iterator[None]:
    """Nothing of the machine is hidden."""
    with isolation.shown():
        yield


@pytest.fixture(scope="package")
def cluster(machine: None) -> Iterator[Cluster]:
    """The cluster, with a fresh clone of the working tree and an empty store that holds the image."""
    if problem := _problem():
        needs.lack("cluster", problem)
    home = STATE / "home"
    shutil.rmtree(home, ignore_errors=True)
    user = Cluster(home)
    (home / "shared store" / "images").mkdir(parents=True)
    subprocess.run(["bash", "-c", 'source jobs/lib.sh; mkdir -p "$1"; copy_tracked . "$1"', "-", home / "ftlib"],
                   check=True, cwd=REPOSITORY)  # fmt: skip
    shutil.copy(STATE / "ftlib.sif", user.image)
    subprocess.run(["chown", "-R", f"{USER}:", home], check=True)
    _make_login()
    yield user
    subprocess.run(["scancel", *user.jobs], check=False)


@pytest.fixture(autouse=True)
def no_job_outlives_its_test(cluster: Cluster) -> Iterator[None]:
    """What a test has begun and does not wait for would take the next one's nodes."""
    before = len(cluster.jobs)
    yield
    if begun := cluster.jobs[before:]:
        subprocess.run(["scancel", *begun], check=False, capture_output=True)


def _make_login() -> None:
    """The login node's Python: Debian's own, which the user may run, with the light install's requirements and the
    clone, as by `pip install -e`. `wheels` in it serves further installs without a package index.
    """
    login, lock = STATE / "login", REPOSITORY / "containers" / "lock-py311.txt"
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    needed = settings["options"]["install_requires"].split()
    installed = files.json_sha256([needed, lock.read_text()])
    done = (login / "done").exists() and (login / "done").read_text() == installed
    if not done or not (login / "wheels").is_dir():
        shutil.rmtree(login, ignore_errors=True)
        subprocess.run(["/usr/bin/python3", "-m", "venv", login], check=True)
        pip, wheels = login / "bin" / "pip", login / "wheels"
        subprocess.run([pip, "wheel", "-q", "-w", wheels, "-c", lock, *needed, "setuptools"], check=True)
        subprocess.run([pip, "install", "-q", "--no-index", "--find-links", wheels, *needed], check=True)
        (packages,) = login.glob("lib/python3*/site-packages")
        (packages / "ftlib.pth").write_text(f"{STATE}/home/ftlib\n")
        program = f"#!{login}/bin/python\nimport sys\n\nfrom ftlib.__main__ import main\n\nsys.exit(main())\n"
        (login / "bin" / "ftlib").write_text(program)
        (login / "bin" / "ftlib").chmod(0o755)
        (login / "done").write_text(installed)


def life() -> Path:
    """The folder of the version of Slurm that is up: its pid files, logs, devices."""
    settings = Path("/etc/slurm/slurm.conf").read_text()
    return NEWER if f"StateSaveLocation={NEWER}/" in settings else STATE


def bring_up() -> None:
    """Start what is missing of the cluster that is up."""
    version = "24.11" if life() == NEWER else "22.05"
    subprocess.run(
        [REPOSITORY / "tests/cluster/up.sh"], check=True, capture_output=True, env={**os.environ, "SLURM": version}
    )


def _problem() -> str | None:
    if os.geteuid() != 0:
        return "its tests need root"
    if not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode:
        return "Slurm does not answer"
    if not (STATE / "ftlib.sif").exists():
        return f"there is no image {STATE / 'ftlib.sif'}"
    return None


def history(run: Path) -> list[dict[str, object]]:
    """What happened to a run."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def members(runs: Path, name: str) -> list[Path]:
    """The run folders of a name."""
    return sorted(path.parent for path in (runs / name).glob("*/config.yaml"))


def weights(run: Path) -> bytes:
    """The file of a full result."""
    return (run / "model" / "model.safetensors").read_bytes()


def losses(run: Path) -> dict[int, float]:
    """Step → loss."""
    return {one["step"]: one["loss"] for one in jsonl.read_jsonl_log(run / "metrics.jsonl") if "loss" in one}


def status(cluster: Cluster, name: str, runs: Path) -> dict[str, Any]:
    """What `ftlib status` says of the only run of a name."""
    done = cluster.ftlib(f"status {name} --json", FTLIB_RUNS=runs)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    return dict(record)
