"""Pipes that nobody reads, Ctrl-C at any time, input that is no text, and names of several runs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.cli import chat
from ftlib.core import files, log, signals
from ftlib.core.paths import find_site
from ftlib.evaluation.model import EvalModel
from ftlib.models.generation import GeneratedAnswer
from ftlib.runs import run as runs
from tests.conftest import LORA
from tests.reports import fake_runs

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]

WAITS = """
import sys, time
slow = sys.argv[1]
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == slow:
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = ["ftlib", *sys.argv[2:]]
from ftlib.__main__ import main
sys.exit(main())
"""
"""A command during which the import of a module takes a minute."""


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["status"], ["--version"]])
def test_output_that_nobody_reads(store: Path, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "ftlib", *command], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and "BrokenPipe" not in done.stderr


def test_messages_that_nobody_reads(store: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "ftlib", "report", "x"], stderr=writing, stdout=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and not done.stdout


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("ftlib.cli.main", ["status"]),
        ("ftlib.core.paths", ["status"]),
        ("ftlib.cli.status", ["status"]),
        ("torch", ["plan", "configs/digits.yaml"]),
    ],
)
def test_ctrl_c_during_imports(store: Path, module: str, command: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, module, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "ftlib: interrupted\n"), "there is nothing to resume"


def test_resuming_is_only_told_where_something_is_saved() -> None:
    signals.install_handlers()
    assert signals.end_message("interrupted") == "interrupted"
    signals.mark_resumable()
    assert signals.end_message("interrupted") == "interrupted; run the same command again to resume"
    signals.install_handlers()
    assert signals.end_message("interrupted") == "interrupted"


def stdin_of(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_what_is_no_text_is_told_to_who_chats(
    store: Path, write_config: WriteConfig, shared: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((shared / "data" / "images").iterdir())
    monkeypatch.setattr(
        EvalModel, "generate", lambda self, rows, settings: [GeneratedAnswer("an answer", True, [], []) for _ in rows]
    )
    folder = shared / "model"
    stdin_of(f"/image {image}\n".encode() + "wie heißt das?\n".encode("latin-1") + "何？\n".encode(), monkeypatch)
    code, out, error = ftlib("chat", folder)
    assert code == 0 and out == "an answer\n" and error.count("this line is not UTF-8") == 1
    assert "Traceback" not in error and chat.COMMANDS


@pytest.mark.parametrize(("typed", "answer"), [(b"y\n", True), (b"", False), (b"\xff\n", False), (b"n\n", False)])
def test_a_question_takes_nothing_but_yes(typed: bytes, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-D and bytes that are no text mean no."""
    stdin_of(typed, monkeypatch)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert log.ask("Delete?", "--yes") is answer


def test_a_report_is_written_to_a_folder_or_an_html_file(store: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    run = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG)
    fake_runs.train(run)
    (tmp_path / "pages").mkdir()
    code, out, error = ftlib("report", "pets", "-o", tmp_path / "pages")
    assert (code, out.strip()) == (0, str(tmp_path / "pages" / "report.html")), error
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {"report.html", "report.md", "report.csv"}
    for name in ("page.md", "page", "page.csv"):
        code, _, error = ftlib("report", "pets", "-o", tmp_path / name)
        assert code == 2 and "ends in .html, or an existing folder" in error and not (tmp_path / name).exists()


def test_evaluating_an_edited_config_leaves_nothing(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, shared: Path
) -> None:
    config = write_config(LORA)
    assert ftlib("evaluate", config, "--before")[0] == 2, "not prepared"
    assert not (store / "runs").exists()
    assert ftlib("prepare", config)[0] == 0
    trained = ("training.max_steps=1",)
    code, out, error = ftlib("train", config, *trained)
    assert code == 0, error
    folder = Path(out.strip().splitlines()[0])
    code, _, error = ftlib("evaluate", config, *trained, "seed=5")
    assert code == 2 and "not trained yet" in error and f"tiny/{folder.name}  trained" in error
    assert list(folder.parent.iterdir()) == [folder]
    code, _, error = ftlib("evaluate", config, *trained, "model.base=/nowhere", "--before")
    assert code == 2 and list(folder.parent.iterdir()) == [folder]
    old = folder.with_name("0" * 12)  # what version 0.1 left
    files.write_text(old / "config.yaml", (folder / "config.yaml").read_text().replace("seed: 3", "seed: 5"))
    image = next((shared / "data" / "images").iterdir())
    code, _, error = ftlib("predict", "tiny", "--prompt", "x", "--image", image)
    assert code == 0, error
    code, _, error = ftlib("logs", "tiny")
    assert code == 2 and str(folder) in error and "several runs" not in error
    os.utime(old / "config.yaml", (time.time() - 2 * 86400,) * 2)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    code, out, error = ftlib("clean", "--yes")
    assert code == 0 and "never started" in out and not old.exists() and folder.exists(), error


def test_several_runs_are_listed_with_what_tells_them_apart(store: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2, 3):
        run = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG + f"seed: {seed}\n")
        fake_runs.train(run)
        found.append(run)
    fake_runs.finish(found[0])
    code, _, error = ftlib("logs", "pets")
    names = [runs.run_name(run, find_site()) for run in found]
    assert code == 2 and "pets: several runs have this name" in error
    assert f"  {names[0]}  trained: seed=1\n" in error and f"  {names[1]}  not trained yet: seed=2\n" in error
    assert runs.find_trained_run("pets", find_site()).folder == found[0].folder
    fake_runs.finish(found[1])
    code, _, error = ftlib("push", "pets", "--yes")
    assert code == 2 and f"  {names[1]}  trained: seed=2\n" in error
    code, _, error = ftlib("push", names[2], "--yes")
    assert code == 2 and "not trained yet" in error
