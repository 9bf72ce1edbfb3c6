"""The login node: `pip install .` alone, without torch, quick to start."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with nothing but ftlib's light core."""
    root = tmp_path_factory.mktemp("light")
    venv.create(root, with_pip=True)
    source = root / "source"
    subprocess.run(["git", "clone", "-q", REPOSITORY, source], check=True)
    for line in subprocess.run(["git", "-C", REPOSITORY, "ls-files", "-mo", "--exclude-standard", "ftlib", "setup.cfg"],
                               check=True, capture_output=True, text=True).stdout.split():  # fmt: skip
        if (REPOSITORY / line).exists():
            (source / line).parent.mkdir(parents=True, exist_ok=True)
            (source / line).write_bytes((REPOSITORY / line).read_bytes())
    lock = REPOSITORY / "containers" / ("lock-py310.txt" if sys.version_info < (3, 11) else "lock-py311.txt")
    subprocess.run([root / "bin" / "pip", "install", "-q", "-c", lock, source], check=True)
    return root / "bin"


COMMANDS = ("--help", "schema", "doctor", "status --json", *(f"{name} --help" for name in (
    "submit", "report", "logs", "cancel", "clean", "stage", "push")))  # fmt: skip


@pytest.mark.parametrize("command", [text.split() for text in COMMANDS], ids=COMMANDS)
def test_commands_work_without_torch(light: Path, command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "FTLIB_STORE": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([light / "ftlib", *command], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "ftlib.__main__" in imported or "ftlib" in imported
    assert not imported & {"torch", "transformers", "peft", "accelerate"}


def test_torch_is_not_there(light: Path) -> None:
    assert subprocess.run([light / "python", "-c", "import torch"], capture_output=True).returncode == 1


def test_help_imports_next_to_nothing(light: Path) -> None:
    """What keeps `ftlib --help` within 0.3 s: no pydantic, yaml, rich or submitit for it."""
    done = subprocess.run(
        [light / "python", "-X", "importtime", "-m", "ftlib", "--help"], capture_output=True, text=True
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"pydantic", "yaml", "rich", "submitit", "huggingface_hub", "argparse", "jinja2"}


def test_a_command_that_needs_torch_says_so(light: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FTLIB_STORE": str(tmp_path)}
    command = [light / "ftlib", "stage", REPOSITORY / "configs" / "instruct_tiny.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "jobs/run.sh ftlib" in done.stderr


NEW_RUN = """
import sys
from pathlib import Path
from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from ftlib.runs.run import create_run
create_run(load_experiment(Path(sys.argv[1]), [], find_site()), find_site())
"""


def test_a_run_that_is_not_trained_needs_no_torch_to_say_so(light: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FTLIB_STORE": str(tmp_path)}
    config = REPOSITORY / "configs" / "digits.yaml"
    subprocess.run([light / "python", "-c", NEW_RUN, config], env=environment, check=True, cwd=tmp_path)
    for command in (
        ["evaluate", "digits"],
        ["evaluate", config, "seed=7"],
        ["predict", "digits", "--prompt", "x"],
        ["chat", "digits"],
        ["push", "digits", "--yes"],
    ):
        done = subprocess.run([light / "ftlib", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "not trained yet" in done.stderr, done.stderr
        assert "needs" not in done.stderr and "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("*/*/*/config.yaml"))) == 1


API = """
import sys
import ftlib
config = sys.argv[1]
assert ftlib.status() == [] and ftlib.submit(config, executor="local", dry_run=True).preview
for function in (ftlib.stage, ftlib.train, ftlib.plan):
    try:
        function(config)
        raise SystemExit(f"{function.__name__} needs no torch?")
    except ftlib.UserError as error:
        assert f"{function.__name__} needs " in error.problem and "jobs/run.sh ftlib" in error.remedy, error
"""


def test_the_api_works_without_torch(light: Path, tmp_path: Path) -> None:
    """What needs it raises UserError, as the commands do."""
    command = [light / "python", "-c", API, REPOSITORY / "configs" / "instruct_tiny.yaml"]
    environment = {**os.environ, "FTLIB_STORE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_package_data_are_installed(light: Path) -> None:
    (package,) = light.parent.glob("lib/python*/site-packages/ftlib")
    source = REPOSITORY / "ftlib"
    data = [path for path in source.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.name for path in data} >= {"py.typed", "training_fields.json", "page.html.j2", "report.css"}
    assert not [path for path in data if not (package / path.relative_to(source)).is_file()]
