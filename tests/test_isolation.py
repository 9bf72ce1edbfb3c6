"""The machine that the tests run on is hidden from them, and what is skipped is told with its remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.conftest import REPOSITORY

LOOK = """
import os, shutil, time
from pathlib import Path
import pytest
from tests.isolation import PROGRAMS

def test_nothing_of_the_user_is_in_sight():
    assert not [name for name in os.environ if name.startswith(("SLURM", "FTLIB", "HF_", "SBATCH", "XDG"))]
    assert "planted" not in "".join(os.environ.values())
    assert Path.home() == Path(os.environ["HOME"]) and not list(Path.home().iterdir())
    assert time.strftime("%Z") == "UTC" and os.umask(0o022) == 0o022
    assert {path.name for path in Path(os.environ["PATH"]).iterdir()} <= set(PROGRAMS)

def test_torch_sees_no_gpu():
    import torch
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()

@pytest.mark.java
def test_java_is_in_sight_for_those_that_need_it():
    import subprocess
    assert subprocess.run(["java"], capture_output=True, text=True).stdout == "planted\\n"

@pytest.mark.browser
def test_there_is_no_browser():
    raise AssertionError

"""


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A folder of tests with this one's conftest, as pytest sees the ones here."""
    tests = tmp_path / "ftlib" / "tests"
    tests.mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "isolation.py", "needs.py"):
        shutil.copy(REPOSITORY / "tests" / name, tests)
    shutil.copy(REPOSITORY / "setup.cfg", tests.parent)
    (tests / "test_look.py").write_text(LOOK)
    return tests.parent


def look(inside: Path, workers: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run those tests on an odd machine; with workers, in processes of xdist."""
    (inside / "bin").mkdir(exist_ok=True)
    for name in ("sinfo", "squeue", "apptainer", "java", "nvidia-smi"):
        (inside / "bin" / name).write_text("#!/bin/sh\necho planted\n")
        (inside / "bin" / name).chmod(0o755)
    strange = {
        "PATH": f"{inside / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HOME": "/proc",  # cannot be written
        "TZ": "Asia/Kathmandu",
        "LANG": "C",
        "HF_HOME": "/planted",
        "SLURM_JOB_ID": "7",
        "FTLIB_RUNS": "/planted",
        "SBATCH_PARTITION": "planted",
        **environment,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ran", str(inside / "ran"), "tests"]
    command += ["--numprocesses", str(workers)]
    left_out = ("CI", "CUDA_VISIBLE_DEVICES", "FTLIB_DEMO", "FTLIB_LOWEST_TRANSFORMERS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(command, cwd=inside, env={**kept, **strange}, umask=0o077, capture_output=True, text=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_see_a_minimal_machine_and_what_their_marks_ask_for(inside: Path, workers: int) -> None:
    done = look(inside, workers)
    assert done.returncode == 0, done.stdout
    assert "    1 no browser to look at reports with: apt install chromium\n" in done.stdout
    assert "  all that take long: make long\n" in done.stdout
    ran = (inside / "ran").read_text().splitlines()
    assert len(ran) == 3 and "tests/test_look.py::test_there_is_no_browser" not in ran


def test_under_ci_a_lack_is_a_failure(inside: Path) -> None:
    done = look(inside, CI="true")
    assert done.returncode == 1 and "no browser to look at reports with: apt install chromium" in done.stdout


def test_the_store_of_a_site_is_never_touched(inside: Path) -> None:
    (inside / "jobs").mkdir()
    (inside / "jobs" / "site.env").write_text("FTLIB_STORE=/shared\n")
    done = look(inside)
    assert done.returncode == 2 and "Run them in another checkout: git clone" in done.stdout + done.stderr
    assert not (inside / "ran").exists()


def test_causes_are_counted() -> None:
    reasons = [needs.NEEDS["java"][0]] * 2 + ["something else", f"{needs.NEEDS['cluster'][0]} (Slurm does not answer)"]
    assert needs.summary(reasons, without_long=False) == [
        "    2 no Java, which the official caption programs run on: apt install default-jre-headless",
        "    1 something else",
        "    1 no test cluster (Slurm does not answer): make cluster   # Debian, as root",
    ]
