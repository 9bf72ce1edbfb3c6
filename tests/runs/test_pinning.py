"""One layout and one rule for the code that runs and jobs are pinned to."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.runs import pinning
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY
from tests.test_host_script import machine

__all__ = ["machine"]

CLONE = {
    "ftlib/new_module.py": True,  # never added to git
    "ftlib/metrics/words.txt": True,
    "ftlib/.metrics.py.swp": False,
    "ftlib/.ipynb_checkpoints/run.py": False,
    "ftlib/core/__pycache__/files.cpython-310.pyc": False,
    "jobs/mine.sbatch": True,
    "jobs/site.env": False,
    "docs/page.md": False,
}
"""Files of a clone beside those of the repository → whether they are pinned."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with uncommitted changes, and an editor at work in it."""
    folder = tmp_path / "a site.env" / "clone"
    for part in ("ftlib", "jobs"):
        shutil.copytree(
            REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "site.env"), symlinks=True
        )
    for name in CLONE:
        files.write_text(folder / name, f"# {name}\n")
    (folder / "ftlib" / ".#errors.py").symlink_to("user@host.1")  # emacs' lock leads nowhere
    with (folder / "ftlib" / "errors.py").open("a") as file:
        file.write("# edited\n")
    return folder


def pinned_by_submit(clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    site = Site(Path(machine["FTLIB_STORE"]), Path(machine["FTLIB_RUNS"]))
    target = pinning.snapshot_folder(clone, site)
    pinning.take_snapshot(clone, target, site)
    return target


def pinned_by_a_job(clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    done = run_job(clone, machine)
    assert done.returncode == 0, done.stderr
    (target,) = (Path(machine["FTLIB_RUNS"]) / ".jobs").glob("code-*")
    return target


def pinned_by_a_run(clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    site = Site(Path(machine["FTLIB_STORE"]), Path(machine["FTLIB_RUNS"]))
    monkeypatch.setattr(pinning, "_PACKAGE", clone / "ftlib")
    pinning.exec_pinned_code(Run(site.runs / "a" / "b"), site, ["train"])
    return Run(site.runs / "a" / "b").code


def run_job(
    clone: Path, machine: dict[str, str], line: str = "run_job doctor", **job: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **machine, "SLURM_JOB_ID": "12", **job}
    script = f"source '{clone}/jobs/run.sh'; usr1=0 term=0; {line}"
    return subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("pin", "parts"),
    [
        (pinned_by_submit, ("ftlib", "jobs")),
        (pinned_by_a_job, ("ftlib", "jobs")),
        (pinned_by_a_run, ("ftlib",)),
    ],
    ids=["submit", "a job", "a run"],
)  # fmt: skip
def test_what_is_pinned(clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, pin, parts) -> None:  # type: ignore[no-untyped-def]
    target = pin(clone, machine, monkeypatch)
    assert files.is_complete(target, thorough=True)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} - {files.COMPLETE_MARKER}
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *parts]
    tracked = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    wanted = {name for name, pinned in CLONE.items() if pinned and name.startswith(parts)}
    assert found == {name for name in tracked.stdout.splitlines() if (REPOSITORY / name).exists()} | wanted
    assert (target / "ftlib" / "errors.py").read_text().endswith("# edited\n")
    assert not [path for path in target.rglob("*") if path.stat().st_mode & 0o022]
    assert {path.name for path in target.iterdir()} == {*parts, files.COMPLETE_MARKER}


def test_jobs_with_the_same_code_share_a_snapshot(
    clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However they were submitted; one that ended well leaves nothing else."""
    target = pinned_by_submit(clone, machine, monkeypatch)
    (clone / "config.yaml").write_text("name: mine\n")
    for number in ("12", "13"):
        done = run_job(clone, machine, "run_job train config.yaml", SLURM_JOB_ID=number)
        assert done.returncode == 0, done.stderr
        assert f"{target.parent}/{number}/config.yaml" in (tmp_path / "arguments").read_text().splitlines()
        path = f"APPTAINERENV_PYTHONPATH={target.parent}/{number}/code"
        assert path in (tmp_path / "environment").read_text().splitlines()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_requeued_job_keeps_its_code_and_config(clone: Path, machine: dict[str, str], tmp_path: Path) -> None:
    (clone / "config.yaml").write_text("name: mine\n")
    begin = 'run_step() { realpath "$pinned/code"; exit 75; }; run_job train config.yaml'
    first = run_job(clone, machine, begin)
    assert first.returncode == 75, first.stderr
    (clone / "ftlib" / "errors.py").write_text("broken(\n")
    (clone / "config.yaml").write_text("broken: [")
    again = run_job(clone, machine, begin, SLURM_RESTART_COUNT="1")
    assert again.returncode == 75 and again.stdout == first.stdout, again.stderr
    pinned = Path(machine["FTLIB_RUNS"]) / ".jobs" / "12"
    assert (pinned / "config.yaml").read_text() == "name: mine\n"
    assert (pinned / "config.folder").read_text() == f"{clone}\n"
    other = run_job(clone, machine, begin, SLURM_JOB_ID="13")
    assert other.returncode == 1 and "SyntaxError" in other.stderr, "a new job takes the code as it is now"


def test_a_job_that_an_older_ftlib_pinned(clone: Path, machine: dict[str, str], tmp_path: Path) -> None:
    """It has a copy of the whole clone without a marker."""
    folder = Path(machine["FTLIB_RUNS"]) / ".jobs" / "12"
    files.write_text(folder / "code" / "ftlib" / "__init__.py", "# old\n")
    files.write_text(folder / "config.yaml", "name: old\n")
    done = run_job(clone, machine, "run_job train config.yaml", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert f"APPTAINERENV_PYTHONPATH={folder}/code" in (tmp_path / "environment").read_text().splitlines()
    assert f"{folder}/config.yaml" in (tmp_path / "arguments").read_text().splitlines()
    assert not list(folder.parent.glob("code-*"))


def test_a_snapshot_that_was_changed_ends_a_job(
    clone: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = pinned_by_submit(clone, machine, monkeypatch)
    module = target / "ftlib" / "errors.py"
    module.write_text(module.read_text().replace("# edited", "evil = 1"))
    done = run_job(clone, machine)
    assert done.returncode == 2 and "this snapshot of the code has been changed since it was made" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "environment").exists()


def test_further_folders_belong_to_the_content(clone: Path, machine: dict[str, str]) -> None:
    """The acceptance job pins tests/, too."""
    files.write_text(clone / "tests" / "gpu" / "page.py", "x = 1\n")
    step = 'enter_job; pin "" tests; realpath "$pinned/code"'
    done = run_job(clone, machine, step)
    assert done.returncode == 0, done.stderr
    target = Path(done.stdout.strip())
    assert (target / "tests" / "gpu" / "page.py").is_file() and (target / "jobs" / "run.sh").is_file()
    pinning.require_unchanged(target)
    files.write_text(clone / "tests" / "gpu" / "page.py", "x = 2\n")
    assert Path(run_job(clone, machine, step).stdout.strip()) != target
