"""push: the result, its card, and nothing that is nobody's business."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ftlib.core import files
from ftlib.core.paths import Site, find_site
from ftlib.runs.run import Run
from tests.fake_hub import TOKEN, serving
from tests.merging import bare
from tests.reports import fake_runs

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
    with files.atomic_directory(run.folder / "adapter") as folder:
        files.write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text("peft's own")
    return run


def test_adapter_and_card(ftlib: Ftlib, run: Run, remote: Path, tmp_path: Path) -> None:
    code, _, error = ftlib("push", "pets", "--yes")
    assert code == 2 and "not trained yet" in error
    fake_runs.finish(run)
    code, _, error = ftlib("push", "pets", "--yes")
    assert code == 2 and "hf auth login" in error and "Traceback" not in error
    (tmp_path / "token").write_text(TOKEN)
    code, output, error = ftlib("push", "pets", "--yes", "--to", "lab/pets-lora")
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
    assert ftlib("push", "pets", "--yes", "--public")[0] == 0
    assert (remote / "created").read_text() == "me/pets public"
    assert json.loads((remote / "pushed" / "adapter_config.json").read_text()) == {"peft_type": "LORA"}


def test_what_leaves_is_listed_and_asked(
    ftlib: Ftlib, run: Run, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs.finish(run)
    (tmp_path / "token").write_text(TOKEN)
    (run.folder / "adapter" / "sample.PNG").write_bytes(fake_runs.PNG)
    code, output, error = ftlib("push", "pets")
    assert code == 2 and "--yes" in error and not (remote / "created").exists() and not output
    assert re.search(r"^adapter_model.safetensors +7$", error, re.MULTILINE) and "together" in error
    assert (
        "pictures of the data: sample.PNG; text of the data: none" in error
        and "to: pets; if it is new, private" in error
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in ("", "n"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert ftlib("push", "pets")[0] == 0 and not (remote / "created").exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert ftlib("push", "pets")[0] == 0 and (remote / "pushed" / "sample.PNG").exists()


def test_privacy_keeps_pictures_and_texts_back(ftlib: Ftlib, store: Path, remote: Path, tmp_path: Path) -> None:
    config = fake_runs.CONFIG.replace('"{prefix}"', '"planted question {prefix}"')
    run = fake_runs.new_run(find_site(), tmp_path, config + "privacy: {images: false, text: false}\n")
    fake_runs.train(run)
    fake_runs.finish(run)
    with files.atomic_directory(run.folder / "adapter") as folder:
        files.write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
        (folder / "sample.png").write_bytes(fake_runs.PNG)
        (folder / "predictions.jsonl").write_text("{}")
    (tmp_path / "token").write_text(TOKEN)
    code, _, error = ftlib("push", "pets", "--yes")
    assert code == 0 and "pictures of the data: none; text of the data: none" in error
    assert sorted(path.name for path in (remote / "pushed").iterdir()) == ["README.md", "adapter_config.json"]
    assert "planted" not in (remote / "pushed" / "README.md").read_text()


def test_no_path_and_no_user_is_told(
    ftlib: Ftlib, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "planted-user é"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "planted-user")
    monkeypatch.setenv("FTLIB_STORE", str(home / "store"))
    monkeypatch.setenv("FTLIB_RUNS", str(home / "runs" / "planted-user"))
    base = home / "store" / "hf" / "hub" / "models--google--gemma-planted" / "snapshots" / "abc"
    base.mkdir(parents=True)
    config = fake_runs.CONFIG.replace("ftlib/tiny-paligemma", f"'{base}'")
    run = fake_runs.new_run(find_site(), tmp_path, config)
    fake_runs.train(run)
    fake_runs.finish(run)
    other = "/scratch/planted-user/models/other"
    written = {
        "adapter_config.json": {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 4},
        "config.json": {"_name_or_path": other, "text_config": {"_name_or_path": f"{home}/x y/z"}, "n": ["/usr", 1]},
        "tokenizer_config.json": {"name_or_path": str(run.folder / "model"), "tokenizer_file": f"{other}/t.json"},
        "training_args.json": {
            "output_dir": "./planted-user/out",
            "logging_dir": str(home),
            "note": f"in {run.folder}, in {find_site().runs}",
        },
        "tokenizer.json": {"model": {"vocab": {"/home": 1, "/data": 2}}},
    }
    with files.atomic_directory(run.folder / "adapter") as folder:
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "notes.txt").write_text(f"made in {run.folder}/adapter, of {home}/data/a.jsonl")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "token").write_text(TOKEN)
    assert ftlib("push", "pets", "--yes")[0] == 0
    pushed = remote / "pushed"
    told = [path.name for path in pushed.rglob("*") if path.is_file() and b"planted-user" in path.read_bytes()]
    assert not told and not [path for path in pushed.rglob("*") if str(tmp_path).encode() in path.read_bytes()]
    sent = {name: json.loads((pushed / name).read_text()) for name in written}
    assert sent["adapter_config.json"] == {
        "base_model_name_or_path": "google/gemma-planted",
        "peft_type": "LORA",
        "r": 4,
    }
    assert sent["config.json"] == {"_name_or_path": "other", "text_config": {"_name_or_path": "z"}, "n": ["/usr", 1]}
    assert sent["tokenizer_config.json"] == {"name_or_path": "model", "tokenizer_file": "t.json"}
    assert sent["tokenizer.json"] == written["tokenizer.json"]
    assert (pushed / "notes.txt").read_text() == "made in adapter, of a.jsonl"
    card = (pushed / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "google/gemma-planted"
    kept = files.read_json(run.folder / "adapter" / "adapter_config.json")
    assert kept["base_model_name_or_path"] == str(base), "the run itself keeps it"


def test_without_a_connection(ftlib: Ftlib, run: Run, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.finish(run)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, error = ftlib("push", "pets", "--yes")
    assert code == 2 and "cannot be pushed" in error and "Traceback" not in error


def test_a_merge_is_pushed_without_its_inputs_paths(ftlib: Ftlib, store: Path, remote: Path, tmp_path: Path) -> None:
    base = bare.random_weights(0)
    bare.save(tmp_path / "base", base)
    bare.save(tmp_path / "a", bare.tuned(base, 1))
    words = ["--base", tmp_path / "base", "--model", tmp_path / "a", "--method", "linear", "-o", tmp_path / "out"]
    assert ftlib("merge", *words)[0] == 0
    (tmp_path / "token").write_text(TOKEN)
    code, output, error = ftlib("push", tmp_path / "out", "--yes", "--to", "lab/merged")
    assert code == 0 and output.strip().endswith("/lab/merged"), error
    pushed = {path.name: path.read_bytes() for path in (remote / "pushed").iterdir()}
    assert sorted(pushed) == ["README.md", "merge.json", "model.safetensors"]
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    assert set(json.loads(pushed["merge.json"])["inputs"]) == {"base", "a"}
    assert "base_model" not in yaml.safe_load(pushed["README.md"].decode().split("---")[1])


def test_what_was_pushed_comes_back_by_its_name(ftlib: Ftlib, store: Path, remote: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        folder = remote / "models" / "lab" / name
        weights = bare.random_weights(len(name))
        bare.save(folder, weights)
        (folder / "weights.safetensors").rename(folder / "model.safetensors")
        code, output, error = ftlib("stage", f"lab/{name}")
        assert code == 0 and f"models--lab--{name}" in output, error
    words = ["--base", "lab/base", "--model", "lab/tuned", "--method", "linear", "-o", tmp_path / "out"]
    code, _, error = ftlib("merge", *words)
    assert code == 0, error
    head = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert head["base_model"] == ["lab/base", "lab/tuned"]
    code, _, error = ftlib("stage", "lab/base", "revision=v9")
    assert code == 2 and "no revision v9" in error
    code, _, error = ftlib("stage", "lab/base", "seed=1")
    assert code == 2 and "only revision=… can be set" in error
