"""What must not leave: secrets of the environment, in any file or on any screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import LORA
from tests.fake_hub import TOKEN, serving

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]
CANARY = 'pl4nted/c4nary"é'
PASSWORD = "pl4ntedPassw0rd"
FORMS = ("pl4nted", TOKEN)

DIES = """
import sys, ftlib.training.train
def fit(experiment, run, site):
    print("working with", sys.argv[1])
    raise RuntimeError(f"cannot connect with {sys.argv[1]!r}\\nsecond line")
ftlib.training.train.run_training = fit
from ftlib.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with secrets in the environment, and a hub behind a password."""
    with serving(tmp_path / "hub", tmp_path, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"].replace("://", f"://me:{PASSWORD}@"))
        monkeypatch.setenv("GITHUB_PAT", CANARY)
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:{PASSWORD}@proxy.example:1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        (tmp_path / "token").write_text(TOKEN)
        yield


def leaks(*folders: Path) -> list[Path]:
    """The files below some folders that hold a secret."""
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in found if any(form.encode() in path.read_bytes() for form in FORMS)]


def clean(result: tuple[int, str, str], code: int = 0) -> str:
    """What a command said, which holds no secret."""
    said = result[1] + result[2]
    assert result[0] == code, said
    assert not any(form in said for form in FORMS), said
    return said


@pytest.mark.usefixtures("secrets")
def test_no_command_writes_or_prints_a_secret(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(LORA)
    for command in ("stage", "prepare"):
        clean(ftlib(command, config))
    died = subprocess.run(
        [sys.executable, "-c", DIES, CANARY, "train", str(config)], capture_output=True, text=True, cwd=tmp_path
    )
    said = clean((died.returncode, died.stdout, died.stderr), 1)
    assert "RuntimeError: cannot connect with '***'" in said and "working with ***" in said
    [history] = store.rglob("history.jsonl")
    assert "cannot connect with '***'" in history.read_text()
    clean(ftlib("train", config))
    clean(ftlib("evaluate", "tiny"))
    clean(ftlib("report", "tiny", "--tensorboard"))
    for arguments in (["status", "--json"], ["status"], ["submit", config, "--dry-run"]):
        clean(ftlib(*arguments))
    clean((0, *ftlib("doctor", config)[1:]))
    assert "cannot be pushed" in clean(ftlib("push", "tiny", "--yes"), 2)  # a password instead of the token
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"].replace(f"me:{PASSWORD}@", ""))
    assert "/me/tiny" in clean(ftlib("push", "tiny", "--yes"))
    assert not leaks(store, tmp_path / "hub" / "pushed")
    sent = (tmp_path / "hub" / "pushed" / "adapter_config.json").read_text()
    assert json.loads(sent)["base_model_name_or_path"] == "model" and str(tmp_path) not in sent


@pytest.mark.usefixtures("secrets")
def test_errors_of_the_hub_tell_no_password(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "down").touch()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    said = clean(ftlib("stage", write_config(LORA, base="some/model")), 2)
    assert "for url 'http://***@127.0.0.1" in said
    for endpoint in (os.environ["HF_ENDPOINT"], f"http://me:{PASSWORD}@127.0.0.1:9", f"http://{PASSWORD}@127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        said = clean(ftlib("stage", write_config(LORA, base="some/model")), 2)
        assert "some/model" in said
    assert not leaks(store)


@pytest.mark.parametrize(
    "variable", ["GITHUB_PAT", "HF_AUTH", "OPENAI_KEY", "PGPASSFILE", "AWS_REGION", "MY_CREDENTIALS", "ANY"]
)
def test_a_config_takes_no_secret(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://me:{PASSWORD}@proxy.example:1" if variable == "ANY" else PASSWORD)
    config = write_config(replace=("source: jsonl", f'source: jsonl\n  prompt: "by ${{{variable}}}"'))
    said = clean(ftlib("prepare", config), 2)
    assert f"config.yaml:8: data.prompt: ${{{variable}}} looks like a secret" in said
    assert not leaks(store)


def test_a_secret_written_out_in_a_config_is_refused(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_PAT", PASSWORD)
    config = write_config(replace=("source: jsonl", f"source: jsonl\n  prompt: by {PASSWORD}"))
    assert "config.yaml:8: data.prompt: holds a secret" in clean(ftlib("prepare", config), 2)
    said = clean(ftlib("train", write_config(), f"data.prompt=https://me:{PASSWORD}@h.example/"), 2)
    assert "command line: data.prompt: holds a secret" in said
    assert not leaks(store)


def test_passwords_in_urls_of_the_data_are_scored_and_not_reported(
    store: Path, shared: Path, tmp_path: Path, write_config: WriteConfig, ftlib: Ftlib
) -> None:
    """Labels and prompts stay as they are in data and predictions; the report, its tables and messages mask them."""
    data = tmp_path / "data"
    shutil.copytree(shared / "data", data)
    url = "https://me:pl4nted@example.org/"
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    changed = [{**row, "prefix": f"{url}?", "suffix": url + row["suffix"]} for row in rows]
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    config = write_config(LORA, root=str(data), replace=("max_steps: 12", "max_steps: 1"))
    config.write_text(config.read_text().replace("splits: [valid]", "splits: [valid], decode: choose"))
    for command in ("prepare", "train", "evaluate", "report"):
        clean(ftlib(command, "tiny" if command == "report" else config))
    (folder,) = (store / "runs").glob("*/tiny/*/eval/*/valid/after")
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert all(record["prompt"] == f"{url}?" for record in records)
    assert {record["prediction"] for record in records} <= {row["suffix"] for row in changed}
    assert {path.name for path in leaks(store / "runs")} == {"predictions.jsonl", "scores.json"}
    assert "https://***@example.org/" in next(folder.parents[3].glob("report.html")).read_text()
