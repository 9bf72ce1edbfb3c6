"""A submitted job, from `ftlib submit` to its commands: real batch script, real submitit; only Slurm and the container
are stood in for.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.slurm.fake_slurm import FakeSlurm

PROGRAMS = {
    "apptainer": """
if [[ $* == *inspect* ]]; then echo org.ftlib.revision: abc; exit; fi
while [[ $1 != "$FTLIB_IMAGE" ]]; do
    if [[ $1 == --pwd ]]; then cd "$2"; fi
    shift
done
shift
while IFS='=' read -r name value; do export "${name#APPTAINERENV_}=$value"; done < <(env | grep ^APPTAINERENV_)
unset PYTHONSAFEPATH # as if this was Python 3.10, which knows it not
exec "$@"
""",
    "srun": """
echo step >> "$STEPS"
if [[ $(wc -l < "$STEPS") == 3 ]]; then exit 2; fi
while [[ $1 == -* ]]; do shift; done
"$@" || exit
echo "$HOSTILE" > "$PWD/numpy.py"
""",
    "python3": f'exec {shlex.quote(sys.executable)} "$@"',
}
HOSTILE = """
import os, pathlib
pathlib.Path(os.environ["EXECUTED"]).write_text(__file__)
raise ImportError(__file__)
"""


def test_a_job_runs_its_snapshot_and_no_module_of_the_folder(
    write_config: Callable[..., Path], shared: Path, store: Path, tmp_path: Path
) -> None:
    """The clone is edited while the job is pending; the folder of `submit` holds modules, and more as it runs."""
    clone, here, executed = tmp_path / "a clone", tmp_path / "downloads", tmp_path / "executed"
    for part in ("ftlib", "jobs"):
        shutil.copytree(REPOSITORY / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    (here / "ftlib").mkdir(parents=True)
    for name in ("yaml.py", "submitit.py", "runpy.py", "ftlib/__init__.py"):
        (here / name).write_text(HOSTILE)
    slurm = FakeSlurm(tmp_path / "bin")
    for name, text in PROGRAMS.items():
        (slurm.folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (slurm.folder / name).chmod(0o755)
    (tmp_path / "ftlib.sif").touch()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")},
        "PATH": f"{slurm.folder}:{os.environ['PATH']}",
        "FTLIB_STORE": str(store),
        "FTLIB_IMAGE": str(tmp_path / "ftlib.sif"),
        "EXECUTED": str(executed),
        "HOSTILE": HOSTILE,
        "STEPS": str(tmp_path / "steps"),
    }
    command = [sys.executable, clone / "ftlib" / "run_module.py", "-m", "ftlib", "submit"]
    config = write_config(base="ftlib/tiny-paligemma", root=str(shared / "data"))
    done = subprocess.run([*command, config], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "71\n"), done.stderr

    (clone / "ftlib" / "__init__.py").write_text(HOSTILE)
    (clone / "jobs" / "run.sh").write_text("exit 9\n")
    job = {**environment, "SLURM_JOB_ID": "71"}
    script = slurm.folder / "script-71"
    done = subprocess.run(["bash", script], cwd=here, env=job, capture_output=True, text=True)
    assert not executed.exists(), executed.read_text()
    assert done.returncode == 2 and len(list((store / "prepared").iterdir())) >= 1, done.stderr
    assert (tmp_path / "steps").read_text() == "step\n" * 3 and (here / "numpy.py").exists()
