"""The shell around the container, as far as it can be tried without a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ftlib.errors import UserError
from ftlib.site import read_site_env
from tests.conftest import REPOSITORY

SCRIPTS = sorted(
    [*(REPOSITORY / "jobs").glob("*.s*"), *REPOSITORY.glob("containers/*.sh"), *REPOSITORY.glob("tests/cluster/*.sh")]
)


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path.suffix in (".sh", ".sbatch")], ids=lambda path: path.name
)
def test_scripts_parse(path: Path) -> None:
    assert bash(f"bash -n '{path}'").stderr == ""


SITE_ENV = """\
# comment
FTLIB_STORE=/a b/$HOME/`id`

  FTLIB_RUNS="/quoted path"
X='single'
EMPTY=
URL=name=value
"""


def test_bash_and_python_read_site_env_alike(tmp_path: Path) -> None:
    file = tmp_path / "site.env"
    file.write_text(SITE_ENV)
    names = ["FTLIB_STORE", "FTLIB_RUNS", "X", "EMPTY", "URL"]
    show = "".join(f'printf "%s\\n" "${name}"; ' for name in names)
    ours = bash(f"unset FTLIB_STORE FTLIB_RUNS; source jobs/lib.sh; read_site_env '{file}'; {show}")
    values = read_site_env(file)
    assert ours.stdout.splitlines() == [values[name] for name in names]
    assert values["FTLIB_STORE"] == "/a b/$HOME/`id`"


@pytest.mark.parametrize("line", ["export X=1", "x=1", "nonsense", "X Y=1"])
def test_bash_and_python_refuse_alike(tmp_path: Path, line: str) -> None:
    file = tmp_path / "site.env"
    file.write_text(f"A=1\n{line}\n")
    done = bash(f"source jobs/lib.sh; read_site_env '{file}'")
    assert done.returncode == 2
    with pytest.raises(UserError) as caught:
        read_site_env(file)
    assert done.stderr.strip() == f"ftlib: {caught.value.problem}"


def test_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("X=file\n")
    done = bash(f"source jobs/lib.sh; read_site_env '{tmp_path}/site.env'; echo $X", X="environment")
    assert done.stdout == "environment\n"


def test_by_hand_without_a_container_or_an_image(tmp_path: Path) -> None:
    bare = {"FTLIB_STORE": str(tmp_path / "store")}
    for name in ("bash", "dirname", "id", "mkdir", "grep"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = bash("jobs/run.sh ftlib doctor", PATH=str(tmp_path), **bare)
    assert done.returncode == 2 and "neither apptainer nor singularity" in done.stderr
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    done = bash("jobs/run.sh ftlib doctor", PATH=str(tmp_path), **bare)
    assert done.returncode == 2 and "ftlib.sif is not there. Build it: sbatch jobs/build.sbatch" in done.stderr
    done = bash("source jobs/run.sh; run_job", **bare)
    assert done.returncode == 2 and "usage: sbatch jobs/ftlib.sbatch COMMAND" in done.stderr
    done = bash("jobs/run.sh train configs/digits.yaml", **bare)
    assert done.returncode == 2 and "usage: jobs/run.sh ftlib COMMAND" in done.stderr


STEP = """
source jobs/run.sh
job_tmp='{tmp}' container=(enter) usr1=0 term=0
mkdir -p "$job_tmp/notes"
srun() {{ {srun}; }}
run_step {command} CONFIG
"""


@pytest.mark.parametrize(
    ("command", "alone"), [("stage", True), ("prepare", True), ("train", False), ("evaluate", False)]
)
def test_only_training_and_evaluation_run_on_every_gpu(tmp_path: Path, command: str, alone: bool) -> None:
    done = bash(STEP.format(tmp=tmp_path, srun='echo "$@"', command=command))
    assert done.returncode == 0 and f"ftlib {command} CONFIG" in done.stdout
    assert done.stdout.startswith("--ntasks=1 --ntasks-per-node=1 ") == alone


def test_the_first_failing_task_gives_the_reason(tmp_path: Path) -> None:
    """Slurm ends the other tasks then; as they save and say 75, the job would look preempted."""
    failing = 'echo 2 > "$job_tmp/notes/failed"; return 75'
    assert bash(STEP.format(tmp=tmp_path, srun=failing, command="train")).returncode == 2


def test_a_definition_for_builders_without_build_arguments(tmp_path: Path) -> None:
    settings = {"BASE": "some/base:1.2", "INDEX_URL": "https://index.example/simple", "FTLIB_STORE": str(tmp_path)}
    done = bash(f"containers/build.sh --render '{tmp_path}/x.def'", **settings)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x.def").read_text()
    assert "{{" not in text and "%arguments" not in text
    assert "From: some/base:1.2" in text and 'PIP_INDEX_URL="https://index.example/simple"' in text
    assert text.startswith("Bootstrap: docker\n")
    context = REPOSITORY / "build" / "context"
    assert (context / "ftlib" / "__main__.py").exists() and not (context / ".git").exists()
