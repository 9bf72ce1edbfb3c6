"""Folders that cannot be written: each command says which and what to do, exits with 2 and leaves no traceback."""

from __future__ import annotations

import contextlib
import io
import logging.config  # noqa: F401  (read by submitit; other users may not reach this Python's files)
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.cli.main import main
from tests.conftest import CONFIG, FULL
from tests.slurm.fake_slurm import FakeSlurm
from tests.users import ALICE, place

__all__ = ["place"]
Ftlib = Callable[..., tuple[int, str, str]]


def answer(folder: Path, environment: dict[str, str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command in a folder; in a process of its own, since it changes both."""
    os.chdir(folder)
    os.environ.update(environment)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = main([str(argument) for argument in arguments])
    return code, told.getvalue()


@pytest.fixture(scope="module")
def made(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data, config, a store in which the config is prepared, and its trained run."""
    root = tmp_path_factory.mktemp("made")
    for name in ("model", "data"):
        shutil.copytree(shared / name, root / name)
    text = CONFIG.replace("ADAPTER", FULL).replace("BASE", "model").replace("ROOT", "data")
    (root / "config.yaml").write_text(text.replace("max_steps: 12", "max_steps: 1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTLIB_STORE", str(root / "store"))
        for command in ("prepare", "train", "evaluate"):
            assert main([command, str(root / "config.yaml")]) == 0
    return root


@pytest.fixture
def hers(place: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same where everybody can read it, as Alice's own."""
    (place / "home").mkdir()
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("USER", "root")  # whose runs these are called
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    shutil.copytree(made, place / "made")
    for path in (place / "home", place / "made", *(place / "made").rglob("*")):
        os.chown(path, ALICE.number, ALICE.groups[0])
    return place / "made"


def lock(*folders: Path) -> None:
    """Take folders and all in them from Alice, who can still read them."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 0, 0)
            path.chmod(0o755 if path.is_dir() else 0o644)


COMMANDS = {
    "stage": ("stage", "config.yaml", "model.base=ftlib/tiny-paligemma"),
    "prepare": ("prepare", "config.yaml", "data.split.seed=7"),
    "train": ("train", "config.yaml", "seed=7"),
    "evaluate": ("evaluate", "tiny", "--split", "test"),
    "prompts": ("prompts", "config.yaml", "evaluation.prompts=[digit]"),
    "report": ("report", "tiny"),
    "submit": ("submit", "config.yaml", "seed=7", "--executor", "debug"),
    "submit --replace": ("submit", "config.yaml", "--executor", "debug", "--replace"),
    "merge": ("merge", "--base", "model", "--model", "model", "--method", "linear", "-o", "store/merged/out"),
}


@pytest.mark.users
@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_of_another_user(hers: Path, name: str) -> None:
    lock(hers / "store")
    code, told = ALICE.does(answer, hers, {"FTLIB_STORE": str(hers / "store")}, *COMMANDS[name])
    assert code == 2, told
    assert "Traceback" not in told and str(hers / "store") in told
    assert "Permission denied" in told or "not permitted" in told, told
    assert "FTLIB_STORE" in told or "chmod" in told, told


@pytest.mark.users
@pytest.mark.parametrize("name", ["train", "evaluate", "report", "submit", "submit --replace"])
def test_runs_of_another_user(hers: Path, name: str) -> None:
    lock(hers / "store" / "runs")
    code, told = ALICE.does(answer, hers, {"FTLIB_STORE": str(hers / "store")}, *COMMANDS[name])
    assert code == 2, told
    assert "Traceback" not in told and str(hers / "store" / "runs") in told


@pytest.mark.users
@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, ("submit", "../config.yaml", "seed=7", "--executor", "debug")),
        ({}, ("report", "tiny", "-o", "report.html")),
        ({}, ("merge", "--base", "../model", "--model", "../model", "--method", "linear", "-o", "merged")),
        ({"FTLIB_STORE": ""}, ("prepare", "../config.yaml")),
    ],
    ids=["submit", "report", "merge", "prepare"],
)
def test_a_current_folder_of_another_user(hers: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    (hers / "here").mkdir()
    settings = {"FTLIB_STORE": str(hers / "store"), **environment}
    code, told = ALICE.does(answer, hers / "here", settings, *arguments)
    assert code == 2, told
    assert "Traceback" not in told and (str(hers / "here") in told or "ftlib: report." in told), told
    assert "Permission denied" in told, told


@pytest.mark.users
def test_a_folder_of_the_run_s_name_that_cannot_be_read(hers: Path) -> None:
    """It is here, beside the runs: `status` finds the run all the same. A name without a run is told."""
    for name in ("tiny", "nothing"):
        (hers / "here" / name).mkdir(parents=True, mode=0)
    settings = {"FTLIB_STORE": str(hers / "store")}
    code, told = ALICE.does(answer, hers / "here", settings, "status", "tiny")
    assert code == 0 and "done" in told, told
    for command in (("status", "nothing"), ("predict", "nothing", "--prompt", "digit")):
        code, told = ALICE.does(answer, hers / "here", settings, *command)
        assert code == 2 and "ftlib: nothing: you may not read this folder" in told and "Traceback" not in told, told


@pytest.mark.users
@pytest.mark.parametrize("executor", ["slurm", "debug"])
def test_submit_where_no_logs_can_be_written(hers: Path, executor: str) -> None:
    """As in `/`."""
    slurm = FakeSlurm(hers.parent / "bin")
    (hers / "store" / "images" / "ftlib.sif").touch()
    settings = {"FTLIB_STORE": str(hers / "store"), "PATH": f"{slurm.folder}:{os.environ['PATH']}"}
    arguments = ("submit", hers / "config.yaml", "seed=7", "--executor", executor)
    code, told = ALICE.does(answer, Path("/"), settings, *arguments)
    assert code == 2 and "Traceback" not in told and "/logs" in told and "Permission denied" in told, told
    assert not slurm.scripts()


def in_the_way(kind: str, path: Path) -> None:
    """Put something else where a folder is needed."""
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("")
    else:
        path.symlink_to(path.parent / "nowhere" / "at all")


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize(
    ("place_of_it", "name"),
    [
        ("store", "stage"),
        ("store", "prepare"),
        ("store", "submit"),
        ("store/prepared", "prepare"),
        ("store/models", "stage"),
        ("store/runs", "train"),
        ("store/runs", "submit"),
        ("store/runs/root", "train"),
        ("store/runs/root/tiny", "train"),
        ("store/runs/root/tiny", "submit"),
        ("logs", "submit"),
        ("logs/tiny", "submit"),
        ("store/merged", "merge"),
    ],
)
def test_something_else_in_place_of_a_folder(
    made: Path, tmp_path: Path, kind: str, place_of_it: str, name: str, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    shutil.copytree(made, root)
    in_the_way(kind, root / place_of_it)
    monkeypatch.setenv("FTLIB_STORE", str(root / "store"))
    monkeypatch.setenv("USER", "root")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(root)
    code, _, told = ftlib(*COMMANDS[name])
    assert code == 2, told
    assert "Traceback" not in told and str(root / place_of_it) in told
    assert ("not writable" in told or "cannot be read or written" in told) and "Move it away" in told, told
