"""push: the result, its card, and nothing that is nobody's business."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ftlib import files
from ftlib.runs import Run
from ftlib.site import Site, find_site
from tests.fake_hub import TOKEN, serving
from tests.reporting import fake_runs

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with serving(tmp_path / "hub", tmp_path, monkeypatch):
        yield tmp_path / "hub"


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Run:
    """A finished and evaluated run with an adapter, on a model of the hub."""
    site: Site = find_site()
    config = fake_runs.CONFIG.replace("ftlib/tiny-paligemma", "google/paligemma-3b-pt-224")
    run = fake_runs.new_run(site, tmp_path, config)
    fake_runs.train(run)
    fake_runs.evaluate(run, "valid", "before", fake_runs.BEFORE_ROWS)
    fake_runs.evaluate(run, "valid", "after", fake_runs.AFTER_ROWS)
    with files.publish_folder(run.folder / "adapter") as folder:
        files.write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text("peft's own")
    return run


def test_adapter_and_card(ftlib: Ftlib, run: Run, remote: Path, tmp_path: Path) -> None:
    code, _, error = ftlib("push", "pets")
    assert code == 2 and "not trained yet" in error
    fake_runs.finish(run)
    code, _, error = ftlib("push", "pets")
    assert code == 2 and "hf auth login" in error and "Traceback" not in error
    (tmp_path / "token").write_text(TOKEN)
    code, output, error = ftlib("push", "pets", "--to", "lab/pets-lora")
    assert code == 0 and output.strip().endswith("/lab/pets-lora")
    assert (remote / "created").read_text() == "lab/pets-lora private"
    pushed = remote / "pushed"
    assert sorted(path.name for path in pushed.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    assert (pushed / "adapter_model.safetensors").read_bytes() == b"weights"
    card = (pushed / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "google/paligemma-3b-pt-224" and head["library_name"] == "peft"
    assert "| jsonl | valid | accuracy | 0.7500 |" in card and "1,234 rows, fingerprint `feed0001`" in card
    assert str(tmp_path) not in card
    assert TOKEN not in output + error + card
    assert not [path for path in run.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_public_only_if_said(ftlib: Ftlib, run: Run, remote: Path, tmp_path: Path) -> None:
    fake_runs.finish(run)
    (tmp_path / "token").write_text(TOKEN)
    assert ftlib("push", "pets", "--public")[0] == 0
    assert (remote / "created").read_text() == "me/pets public"
    assert json.loads((remote / "pushed" / "adapter_config.json").read_text()) == {"peft_type": "LORA"}


def test_without_a_connection(ftlib: Ftlib, run: Run, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.finish(run)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, error = ftlib("push", "pets")
    assert code == 2 and "cannot be pushed" in error and "Traceback" not in error
