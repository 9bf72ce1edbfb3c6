"""Terminals obey nothing that file names, histories, labels or answers of models hold, by the real commands."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from ftlib.evaluation.model import EvalModel
from ftlib.models.generation import GeneratedAnswer
from ftlib.runs import run as runs
from tests.conftest import LORA
from tests.reports import fake_runs

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]
CLIPBOARD = "\x1b]52;c;cGxhbnRlZA==\x07"
TITLE = "\x1b]0;planted\x1b\\"
HOSTILE = f"{CLIPBOARD}{TITLE}\x9b2J\x7f行🦊\tend"
SEEN = r"\x1b]52;c;cGxhbnRlZA==\x07\x1b]0;planted\x1b\\x9b2J\x7f行🦊"
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(result: tuple[int, str, str], code: int = 0) -> str:
    """What a command said, in which nothing is left that a terminal obeys."""
    assert result[0] == code, result[2]
    said = result[1] + result[2]
    assert not _OBEYED.search(said), repr(said)
    return said


def test_status_and_logs(store: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    run = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG)
    fake_runs.train(run)
    log = run.folder.parent.parent / "logs" / "job.log"
    log.parent.mkdir()
    log.write_bytes(f"行🦊 50%\r100%\r\n{HOSTILE}\n".encode() + b"\xff broken\n")
    run.log_event("start", log=str(log), step=0, attempt=0)
    run.log_event("failed", command="train", reason=f"no such file {HOSTILE}")
    assert r"\x1b]52;c;" in harmless(ftlib("status"))
    code, text, _ = ftlib("status", "--json")
    assert code == 0 and not _OBEYED.search(text) and CLIPBOARD in json.loads(text)[0]["reason"]
    said = harmless(ftlib("logs", "pets"))
    assert "行🦊 50%\n100%\n" in said and SEEN.partition("]0")[0] in said and "\tend" in said and r"\xff broken" in said


@pytest.mark.parametrize("by_link", [False, True])
def test_logs_show_no_other_files(store: Path, ftlib: Ftlib, tmp_path: Path, by_link: bool) -> None:
    secret = tmp_path / "private" / "key"
    secret.parent.mkdir()
    secret.write_text("planted")
    run = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG)
    path = secret
    if by_link:
        path = tmp_path / "logs" / "pets" / "a.log"
        path.parent.mkdir(parents=True)
        path.symlink_to(secret)
    run.log_event("start", log=str(path), step=0, attempt=0)
    for options in ([], ["-f"]):
        code, output, error = ftlib("logs", "pets", *options)
        assert code == 2 and "is not in a log folder" in error and "planted" not in output + error
    own = tmp_path / "private" / "ftlib-train-12.log"
    own.write_text("of jobs/train.sbatch")
    run.log_event("start", log=str(own), step=0, attempt=0)
    assert ftlib("logs", "pets")[:2] == (0, "of jobs/train.sbatch")
    own.unlink()
    own.symlink_to(secret)
    assert ftlib("logs", "pets")[0] == 2


def test_prepare_names_hostile_files_and_labels(
    store: Path, write_config: WriteConfig, shared: Path, ftlib: Ftlib, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(shared / "data" / "images")
    rows = [json.loads(line) for line in (shared / "data" / "data.jsonl").read_text().splitlines()]
    rows[0]["image"] = f"images/{HOSTILE}.png"
    rows[1]["suffix"] = HOSTILE
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(root=str(data))
    assert r"\x1b]52;c;" in harmless(ftlib("prepare", config), 2)
    for options in (["--check"], []):
        rows[0]["image"] = rows[2]["image"]
        (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        harmless(ftlib("prepare", *options, config))


@pytest.fixture
def trained(store: Path, write_config: WriteConfig, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose model answers with what a terminal obeys."""
    config = write_config(LORA)
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, "training.max_steps=1")[0] == 0
    monkeypatch.setattr(
        EvalModel, "generate", lambda self, rows, settings: [GeneratedAnswer(HOSTILE, True, [], []) for _ in rows]
    )
    return "tiny"


def test_predict_chat_and_the_reports_markdown(
    trained: str, shared: Path, ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((shared / "data" / "images").iterdir())
    said = harmless(ftlib("predict", trained, "--prompt", "x", "--image", image))
    assert r"\x1b]52;c;cGxhbnRlZA==\x07" in said and "行🦊\tend" in said
    code, text, _ = ftlib("predict", trained, "--prompt", "x", "--image", image, "--json")
    assert code == 0 and not _OBEYED.search(text) and json.loads(text)[0]["answer"] == HOSTILE
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {image}\nwhat?\n/{HOSTILE}\n/quit\n"))
    assert harmless(ftlib("chat", trained)).count(r"\x1b]52;c;") == 2
    site = find_site()
    [run] = runs.find_runs([trained], site)
    run.log_event("failed", command="evaluate", reason=HOSTILE)
    assert load_experiment(run.config_file, [], site).config.name == trained
    harmless(ftlib("report", trained))
    for suffix in (".md", ".csv"):
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", run.report.with_suffix(suffix).read_text())
