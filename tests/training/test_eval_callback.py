"""Answers on the way: rounds, the best checkpoint and early stopping; whenever interrupted, the same in the end."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftlib.core import files, jsonl
from ftlib.runs.run import Run
from ftlib.training.eval_callback import preserve_training_state
from ftlib.training.resume import TrainingPhase
from tests.conftest import LORA, read_lines
from tests.training.test_divergence import events, lines
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]
PLAIN = "checkpoint: {steps: 3, keep: 2}\n"
SAMPLING = "max_new_tokens: 4, generation: {do_sample: true, temperature: 2.0, top_k: 0, seed: 5}"
BEST = "checkpoint: {steps: 3, keep: 1, best: {metric: accuracy, every: 4}}\n"
SIGNALLED_WHILE_ASKING = """
import os, signal, sys
from ftlib.evaluation.model import EvalModel
plain, calls = EvalModel.generate, 0
def answer(self, rows, settings):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return plain(self, rows, settings)
EvalModel.generate = answer
from ftlib.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""
ROUNDS = """\
rounds: [{learning_rate: 0.01}, {learning_rate: 0.3, until: {split: train, metric: accuracy, at_least: 1.1}}]
"""


@pytest.fixture
def config(store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve steps, with dropout and sampled answers, so that every random state matters."""
    monkeypatch.setenv("FTLIB_RUNS", "")
    path = write_config(LORA, replace=("max_new_tokens: 4", SAMPLING))
    assert ftlib("prepare", path)[0] == 0
    return path


def rewrite(config: Path, *pairs: tuple[str, str]) -> Path:
    text = config.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    return config


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def published(run: Run) -> dict[str, Any]:
    """Parameter → values, as a checkpoint names them."""
    weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}


def test_asking_in_between_changes_no_loss_and_the_best_becomes_the_result(
    config: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    silent = run_of(config, tmp_path / "silent")
    assert ftlib("train", config)[0] == 0
    run = run_of(rewrite(config, (PLAIN, BEST)), tmp_path / "asked")
    code, _, error = ftlib("train", config)
    assert code == 0, error
    assert losses(run) == losses(silent) and len(set(losses(run))) == 12
    asked = [line for line in lines(run) if "split" in line]
    assert [(line["step"], line["split"], line["metric"]) for line in asked] == [
        (step, "valid", "accuracy") for step in (4, 8, 12)
    ]
    values = [line["value"] for line in asked]
    for line in asked:
        folder = run.evaluation_folder("jsonl", "valid", f"attempt-0-step-{line['step']}")
        rows = jsonl.read_jsonl_log(folder / "predictions.jsonl")
        assert line["value"] == sum(row["prediction"] == row["references"][0] for row in rows) / 12
    best = (4, 8, 12)[values.index(max(values))]
    assert files.read_json(run.done_marker)["best"] == {"step": best, "metric": "accuracy", "value": max(values)}
    kept = {path.name for path in run.checkpoint_root().iterdir()}
    assert kept == {f"checkpoint-{best}", "checkpoint-12"}
    weights = load_file(run.checkpoint_root() / f"checkpoint-{best}" / "trainable.safetensors")
    result = published(run)
    assert set(result) == set(weights) and all(weights[name].equal(result[name]) for name in weights)


@pytest.mark.parametrize(
    ("adapter", "mixed"),
    [
        ("{method: attention}", ["training.bf16=true", "training.use_cpu=true"]),
        ("{method: full, freeze: [vision]}", []),
    ],
)
def test_float32_weights_among_16_bit_ones_are_asked_as_they_are_after_training(
    store: Path, write_config: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch,
    adapter: str, mixed: list[str],
) -> None:  # fmt: skip
    """Training goes on in float32: at the end, asked in training and asked afterwards is the same."""
    monkeypatch.setenv("FTLIB_RUNS", "")
    config = write_config(adapter)
    mixed = ["model.dtype=bfloat16", *mixed]
    best = "checkpoint.best={metric: accuracy, every: 12}"
    assert ftlib("prepare", config)[0] == 0
    run = run_of(config, tmp_path / "runs", *mixed, best)
    code, _, error = ftlib("train", config, *mixed, best)
    assert code == 0, error
    code, _, error = ftlib("evaluate", run.folder, "evaluation.before=false")
    assert code == 0, error
    asked = [read_lines(path) for path in run.folder.glob("eval/jsonl/valid/*/predictions.jsonl")]
    assert len(asked) == 2 and asked[0] == asked[1]
    weights = load_file(run.checkpoint_root() / "checkpoint-12" / "trainable.safetensors")
    assert any(not weight.equal(weight.bfloat16().float()) for weight in weights.values())


def test_the_best_may_be_long_gone_by(config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch) -> None:
    """Values are dictated: the second is the best, the last two are in vain, and so the round ends early."""
    best = "checkpoint: {steps: 1, keep: 1, best: {metric: accuracy, every: 2, patience: 2}}\n"
    run = run_of(rewrite(config, (PLAIN, best)), tmp_path / "runs")
    dictate(monkeypatch, [0.1, 0.4, 0.4, 0.3, 0.9])
    code, _, error = ftlib("train", config)
    assert code == 0, error
    assert [line["value"] for line in lines(run) if "split" in line] == [0.1, 0.4, 0.4, 0.3]
    assert len(losses(run)) == 8 and files.read_json(run.done_marker)["step"] == 8
    assert files.read_json(run.done_marker)["best"]["step"] == 4
    assert {path.name for path in run.checkpoint_root().iterdir()} == {"checkpoint-4", "checkpoint-8"}
    weights = load_file(run.checkpoint_root() / "checkpoint-4" / "trainable.safetensors")
    assert all(weights[name].equal(value) for name, value in published(run).items())


def test_without_its_best_checkpoint_an_attempt_begins_anew(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.training import train

    best = "checkpoint: {steps: 6, keep: 1, best: {metric: accuracy, every: 3}}\n"
    run = run_of(rewrite(config, (PLAIN, best)), tmp_path / "runs")
    with monkeypatch.context() as patch:
        dictate(patch, [0.9, 0.1, 0.2, 0.3])
        patch.setattr(train, "_publish", dying(train._publish, 1))
        assert ftlib("train", config)[0] == 130
        before = lines(run)
        (run.checkpoint_root() / "checkpoint-3" / "trainable.safetensors").write_bytes(b"damaged")
    dictate(monkeypatch, [0.9, 0.1, 0.2, 0.3])
    code, _, error = ftlib("train", config)
    assert code == 0 and "the best checkpoint, of step 3, is damaged or missing; attempt 0 starts again" in error
    assert lines(run) == before and files.read_json(run.done_marker)["best"]["step"] == 3


def test_training_goes_on_as_if_nobody_had_asked() -> None:
    model = torch.nn.Linear(2, 2)
    model.forward = lambda inputs: inputs  # as accelerate wraps it for mixed precision
    wrapped = model.forward

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserve_training_state(model):
        model.eval()
        draw()
        assert "forward" not in model.__dict__
    assert draw() == expected and model.training and model.forward is wrapped


def dictate(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    from ftlib.training.eval_callback import CheckpointEvaluator

    left: Iterator[float] = iter(values)

    def scores(*_: object) -> dict[str, Any]:
        return {"metrics": {"accuracy": {"value": next(left)}}, "unit": "fraction", "remarks": []}

    monkeypatch.setattr(CheckpointEvaluator, "_scores", scores)


def test_converged_training_has_no_second_round(config: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    at_once = ROUNDS.replace("at_least: 1.1", "at_least: 0.0")
    run = run_of(rewrite(config, (PLAIN, PLAIN + at_once), ("  learning_rate: 1.0e-2\n", "")), tmp_path / "runs")
    code, _, error = ftlib("train", config)
    assert code == 0, error
    (told,) = events(run, "round")
    assert told["converged"] is True and (told["split"], told["metric"]) == ("train", "accuracy")
    assert (told["round"], told["step"], told["learning_rate"]) == (0, 12, 0.01)
    assert len(losses(run)) == 12 and files.read_json(run.done_marker)["step"] == 12


def test_rounds_and_the_best_interrupted_at_any_point(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while it asks, between asking and noting, between rounds, within the second, before publishing."""
    from ftlib.evaluation import evaluate
    from ftlib.training import train

    rewrite(config, (PLAIN, BEST + ROUNDS), ("  learning_rate: 1.0e-2\n", ""))
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    broken = run_of(config, tmp_path / "broken")
    near_limit = subprocess.run([sys.executable, "-c", SIGNALLED_WHILE_ASKING, config], capture_output=True, text=True)
    assert near_limit.returncode == 75 and "Traceback" not in near_limit.stderr, near_limit.stderr
    partial = broken.evaluation_folder("jsonl", "valid", "attempt-0-step-4.partial") / "answers"
    assert sum(len(jsonl.read_jsonl_log(log)) for log in partial.glob("answers-*")) == 8, "a batch is kept"
    for module, name, call in (
        (evaluate, "_publish", 1),  # step 4 answered, nothing of it written
        (files, "_replace_directory", 4),  # step 6 is due
        (train, "should_continue", 1),
        (train, "_log_step", 3),
        (Run, "log_event", 2),  # the start is noted, the end of the second round is to be
        (train, "_publish", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying(getattr(module, name), call))
            assert ftlib("train", config)[0] == 130
    assert ftlib("train", config)[0] == 0
    assert outcome_files(broken) == outcome_files(straight)
    assert lines(broken) == lines(straight)
    first, second = events(broken, "round")
    assert (first["round"], first["learning_rate"], first["converged"]) == (0, 0.01, False)
    assert (second["round"], second["learning_rate"], second["converged"]) == (1, 0.3, False)
    rates = [line["learning_rate"] for line in lines(broken) if "loss" in line]
    assert max(rates[:12]) == 0.01 and max(rates[12:]) == 0.3 and rates[12] == 0.0, "a fresh schedule"
    seeds = {line["seed"] for line in events(broken, "round")}
    assert seeds == {3, TrainingPhase(0, 1).seed(3)}


def dying(plain: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Ctrl-C instead of the call of that number."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    return call


def outcome_files(run: Run) -> dict[str, bytes]:
    folder = run.folder / "adapter"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.COMPLETE_MARKER}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["checkpoint.best={metric: CIDEr-D, every: 5}"], "checkpoint.best: task classify has no metric 'CIDEr-D'"),
        (["checkpoint.best={metric: f1, every: 5}"], "checkpoint.best: F1 needs a positive class"),
        (
            ["checkpoint.best={metric: accuracy, every: 5}", "evaluation.positive=z"],
            "evaluation.positive: 'z' is not an answer of the dataset",
        ),
        (
            ["rounds=[{learning_rate: 1}, {learning_rate: 2, until: {metric: acc, at_least: 1.0}}]"],
            "rounds.1.until: task classify has no metric 'acc'",
        ),
    ],
)
def test_what_could_not_be_asked_is_found_before_training(
    config: Path, tmp_path: Path, ftlib: Ftlib, extra: list[str], message: str
) -> None:
    run_of(rewrite(config, ("  learning_rate: 1.0e-2\n", "")), tmp_path / "runs")
    code, _, error = ftlib("train", config, *extra)
    assert code == 2 and message in error


def test_a_metric_that_needs_java_is_asked_for_before_training(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    caption = rewrite(config, ("task: classify", "task: caption"))
    assert ftlib("prepare", caption)[0] == 0
    code, _, error = ftlib("train", caption, "checkpoint.best={metric: METEOR, every: 5}")
    assert code == 2 and "checkpoint.best: METEOR cannot be computed here: Java is not installed" in error
