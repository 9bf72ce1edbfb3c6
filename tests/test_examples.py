"""The plugins in examples/, through the whole chain as a user runs them. Nothing in ftlib/ knows of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core.paths import Site, find_site
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY, read_lines

EXAMPLES = REPOSITORY / "examples"
FEW = (
    "data.split={valid: 8, test: 8, max_train: 40}",
    "training.max_steps=4",
    "training.per_device_train_batch_size=4",
)
Ftlib = Callable[..., tuple[int, str, str]]


def chain(config: Path, ftlib: Ftlib, store: Path, *overrides: str) -> Run:
    """Stage, prepare, train, evaluate, report; the run."""
    name = load_experiment(config, overrides, Site(store, store / "runs")).config.name
    for command in ("stage", "prepare", "train"):
        code, _, error = ftlib(command, config, *overrides)
        assert code == 0, error
    for command in (("evaluate", name, "--split", "test"), ("report", name), ("predict", name, "--prompt", "next: a")):
        code, _, error = ftlib(*command)
        assert code == 0, error
    return runs.find_run(name, Site(store, next(store.glob("runs/*"))))


def test_custom_task(ftlib: Ftlib, store: Path) -> None:
    best = "checkpoint={steps: 2, keep: 9, best: {metric: cer, every: 2}}"
    run = chain(EXAMPLES / "custom_task.yaml", ftlib, store, *FEW, best)
    scores = json.loads((run.folder / "eval" / "string_tasks" / "test" / "after" / "scores.json").read_text())
    assert scores["metric"] == "CER" and scores["higher_is_better"] is False and scores["n"] == 8
    assert set(scores["metrics"]) == {"CER", "exact match"} and scores["value"] > 0
    records = read_lines(run.folder / "eval" / "string_tasks" / "test" / "after" / "predictions.jsonl")
    characters = sum(len(record["references"][0]) for record in records)
    edits = sum(record["score"] * len(record["references"][0]) for record in records)
    assert scores["value"] == pytest.approx(edits / characters)
    values = {line["step"]: line["value"] for line in read_lines(run.metrics) if line.get("metric") == "CER"}
    assert json.loads(run.done_marker.read_text())["best"]["step"] == min(values, key=lambda step: values[step])
    assert "CER" in run.report.read_text()


def test_custom_source(ftlib: Ftlib, store: Path, tmp_path: Path) -> None:
    """As a job runs it: by the run's config, after the plugin beside the submitted config is gone."""
    own = shutil.copytree(EXAMPLES, tmp_path / "own")
    experiment = load_experiment(own / "custom_source.yaml", FEW, find_site())
    begun = runs.create_run(experiment, find_site())
    (own / "custom_source.py").unlink()
    run = chain(begun.config_file, ftlib, store)
    assert run == begun and run.done_marker.exists()
    (folder,) = (store / "prepared").glob("questions-*")
    assert json.loads((folder / "data.json").read_text())["splits"]["test"]["rows"] == 8
    assert json.loads(run.data.read_text())["prepared"] == folder.name
    (tmp_path / "questions.txt").write_text("Q: one?\nA: 1\n\nQ: two?\n\nA: 3\n")
    code, _, error = ftlib("prepare", EXAMPLES / "custom_source.yaml", f"data.root={tmp_path}")
    assert code == 2 and f"{tmp_path / 'questions.txt'}:4: a block has" in error and "questions.txt:6:" in error


def test_custom_model(ftlib: Ftlib, store: Path) -> None:
    run = chain(EXAMPLES / "custom_model.yaml", ftlib, store, *FEW)
    card = (run.folder / "adapter" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "from transformers import AutoModelForCausalLM" in card
    from ftlib.hub.cache import find_model
    from ftlib.models.registry import family_of

    site = Site(store, store / "runs")
    config = load_experiment(run.config_file, [], site).config
    processor = family_of(config.model).load_processor(find_model(config.model, site), config)
    row = processor.encode_train("next: abc", None, "bcd")
    assert processor.decode(row.input_ids) == "User: next: abc\nAssistant: bcd" and row.n_labels == 4
    code, _, error = ftlib("plan", EXAMPLES / "custom_model.yaml", *FEW, "--gpu", "1GiB")
    assert code == 0, error
    code, _, error = ftlib("train", EXAMPLES / "custom_model.yaml", "data.prompt=chat")
    assert code == 2 and "data.prompt: chat requires model.family: vlm, causal" in error


def test_an_error_rate_is_minimised_everywhere(ftlib: Ftlib, store: Path, tmp_path: Path) -> None:
    """Phases, prompts, leaderboard and the best run of a sweep; the best checkpoint: `test_custom_task`."""
    config = EXAMPLES / "custom_task.yaml"
    for command in ("stage", "prepare"):
        assert ftlib(command, config, *FEW)[0] == 0
    rounds = "rounds=[{learning_rate: 1.0e-3}, {learning_rate: 1.0e-4, until: {split: valid, metric: CER, BOUND}}]"
    phases = [FEW[0], "checkpoint={}", "training={max_steps: 4, per_device_train_batch_size: 4}"]
    code, _, error = ftlib("train", config, *phases, rounds.replace("BOUND", "at_least: 0.5"))
    assert code == 2 and "lower CER is better" in error and "at_most instead of at_least" in error
    code, out, error = ftlib("train", config, *phases, rounds.replace("BOUND", "at_most: 1.0e9"))
    assert code == 0, error
    told = [line for line in read_lines(Run(Path(out.strip())).history) if line["event"] == "round"]
    assert [line["converged"] for line in told] == [True]  # the second round is not trained

    code, out, error = ftlib("prompts", config, *FEW, "--prompt", "{input}", "--prompt", "{prefix}", "--json")
    ranked = [one["value"] for one in json.loads(out)]
    assert code == 0 and len(ranked) == 3 and ranked == sorted(ranked) and ranked[0] < ranked[-1], error

    found = {}
    for rate in ("1e-9", "1e-2"):  # nothing is learned, or something
        overrides = ["name=rates", "checkpoint={}", "training.max_steps=40", f"training.learning_rate={rate}"]
        code, out, error = ftlib("train", config, *FEW[:1], *overrides, "training.per_device_train_batch_size=8")
        assert code == 0, error
        run = Run(Path(out.strip()))
        assert ftlib("evaluate", run.folder, "--split", "valid")[0] == 0
        scores = json.loads((run.folder / "eval" / "string_tasks" / "valid" / "after" / "scores.json").read_text())
        found[rate] = scores["value"]
    assert found["1e-9"] != found["1e-2"]
    assert ftlib("report", "rates", "-o", tmp_path / "rates.html")[0] == 0
    board = (tmp_path / "rates.md").read_text().partition("Leaderboard, CER")[2]
    assert "lower is better" in board
    places = {rate: board.index(f"learning\\_rate={float(rate)}") for rate in found}
    assert min(places, key=lambda rate: places[rate]) == min(found, key=lambda rate: found[rate])


def test_train_from_python(store: Path, tmp_path: Path) -> None:
    """As a program of its own, twice: the second time nothing is trained again."""
    command = [sys.executable, EXAMPLES / "train_from_python.py", "3"]
    first, again = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    *scores, page = first.stdout.splitlines()
    assert len(scores) == 2 and all(f"seed {seed}: accuracy " in line for seed, line in enumerate(scores))
    trained = [Run(path.parent) for path in store.glob("runs/*/digits-from-python/*/DONE")]
    assert len(trained) == 2 and Path(page) == trained[0].folder.parent / "report.html" and Path(page).is_file()
    assert again.stdout == first.stdout
    assert all(sum(line["event"] == "start" for line in read_lines(run.history)) == 1 for run in trained)
