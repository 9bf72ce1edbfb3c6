"""Validation loss: the number that training would compute, whoever computes it; training does not notice it."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ftlib.config.identity import identity_fields
from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import files, jsonl, log
from ftlib.core.paths import find_site
from ftlib.data.dataset import open_prepared
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import EncodedExample, model_inputs
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.registry import InputProcessor, model_family
from ftlib.models.tiny import tiny_model, tiny_neox, tiny_processor, tiny_tokenizer
from ftlib.runs.run import Run
from ftlib.training import distributed, validation
from ftlib.training.data import MixtureSampler, SupervisedDataset
from ftlib.training.validation import make_batches, split_loss
from tests.training.test_divergence import lines
from tests.training.test_eval_callback import dying, outcome_files, rewrite
from tests.training.test_resume import KINDS, run_of

Ftlib = Callable[..., tuple[int, str, str]]
SIZES, WEIGHTS = [7, 4], [1.0, 3.0]
KILLED_IN_A_BATCH = """
import os, signal, sys
from ftlib.training import validation
plain, calls = validation._loss_sums, 0
def sums(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return plain(*arguments)
validation._loss_sums = sums
from ftlib.cli.main import main
sys.exit(main(["train", *sys.argv[3:]]))
"""


ROUNDS = "rounds=[{learning_rate: 1.0}, {learning_rate: 2.0, until: {metric: f1, at_least: 1.0}}]"
UNTIL = {"split": "train", "metric": "f1", "at_least": 1.0}
"""As it stands in the identity of runs that are there."""


def config_of(family: str, mixture: bool, **loss: Any) -> Config:
    parts = [{"name": name, "source": "jsonl", "weight": weight} for name, weight in zip("ab", WEIGHTS, strict=True)]
    data = {"source": "mixture", "root": "x", "parts": parts} if mixture else {"source": "jsonl", "root": "x"}
    known = {"name": "x", "task": "classify", "adapter": {"method": "full"}, "data": data, "loss": loss}
    return Config.model_validate({**known, "model": {"family": family, "base": "b"}})


def rows_for(
    family: str, mixture: bool, root: Path, **loss: Any
) -> tuple[torch.nn.Module, SupervisedDataset, Config, list[EncodedExample]]:
    """A tiny model without dropout, eleven rows of very different lengths, and the same rows encoded."""
    config = config_of(family, mixture, **loss)
    torch.manual_seed(0)
    inputs: InputProcessor
    if family == "paligemma":
        Image.new("RGB", (40, 40), "red").save(root / "red.png")
        processor = tiny_processor()
        model, inputs = tiny_model(processor), PaliGemmaInputProcessor(processor)
    else:
        tokenizer = tiny_tokenizer()
        labels_on, packing = config.loss.on, config.loss.packing
        model, inputs = tiny_neox(tokenizer), CausalProcessor(tokenizer, 60, labels_on=labels_on, packing=packing)
    draw = random.Random(0)
    image = "red.png" if family == "paligemma" else ""
    examples = [
        Example(str(n), image, "p" * draw.randint(1, 40), "a" * draw.randint(1, 12), dataset="ab"[n >= 7] * mixture)
        for n in range(11)
    ]
    sizes, weights = (SIZES, WEIGHTS) if mixture else ([11], [1.0])
    templates = config.data.templates
    rows = SupervisedDataset(examples, root, templates, inputs, range(11), MixtureSampler(sizes, weights, 0))
    return model.eval(), rows, config, [rows[place] for place in range(11)]


def entropies(
    model: torch.nn.Module, inputs: InputProcessor, row: EncodedExample, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of every labelled token of a row that stands alone, from all its logits; written out."""
    batch = inputs.collate([row])
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits[0].double()
    odds = logits.log_softmax(dim=-1)
    first = len(row.input_ids) - row.n_labels
    places = range(max(first, 1), len(row.input_ids))
    plain = torch.stack([-odds[place - 1, row.input_ids[place]] for place in places])
    even = torch.stack([-odds[place - 1].mean() for place in places])
    return (1 - smoothing) * plain + smoothing * even


def measured(model: torch.nn.Module, rows: SupervisedDataset, config: Config, micro: int = 3) -> dict[str, Any]:
    return split_loss(model, rows, make_batches(rows, micro), config, contextlib.nullcontext(), "loss")


@pytest.mark.parametrize(
    ("family", "mixture", "loss"),
    [
        ("paligemma", False, {}),
        ("paligemma", True, {"average": "example", "label_smoothing": 0.2}),
        ("causal", False, {"average": "example"}),
        ("causal", True, {"label_smoothing": 0.2}),
        ("causal", False, {"on": "everything"}),
        ("causal", True, {"packing": True}),
    ],
)
def test_it_is_the_loss_of_the_whole_split(family: str, mixture: bool, loss: dict[str, Any], tmp_path: Path) -> None:
    """A mixture's parts weigh as in training; perplexity is of plain tokens, whatever the loss is."""
    model, rows, config, encoded = rows_for(family, mixture, tmp_path, **loss)
    smoothing, by_example = loss.get("label_smoothing", 0.0), loss.get("average") == "example"
    weights = [WEIGHTS[n >= 7] if mixture else 1.0 for n in range(11)]
    losses = [entropies(model, rows.processor, row, smoothing) for row in encoded]
    plain = [entropies(model, rows.processor, row) for row in encoded]

    def mean(tokens: Sequence[torch.Tensor], each: Sequence[float], by_example: bool) -> float:
        tops = [
            weight * float(one.mean() if by_example else one.sum()) for weight, one in zip(each, tokens, strict=True)
        ]
        unders = [weight * (1 if by_example else len(one)) for weight, one in zip(each, tokens, strict=True)]
        return sum(tops) / sum(unders)

    found = measured(model, rows, config)
    assert found["value"] == pytest.approx(mean(losses, weights, by_example), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean(plain, weights, False)), rel=1e-5)
    assert (found["rows"], found["tokens"]) == (11, sum(map(len, plain)))
    assert ("parts" in found) == mixture
    if mixture:
        for part, places in (("a", slice(0, 7)), ("b", slice(7, 11))):
            own = found["parts"][part]
            assert own["value"] == pytest.approx(
                mean(losses[places], [1.0] * len(losses[places]), by_example), rel=1e-5
            )
            assert own["rows"] == len(losses[places])


@pytest.mark.parametrize("world", [2, 3, 8])
def test_however_many_processes_the_same_bits(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches: of eight processes four have none."""
    model, rows, config, _ = rows_for("causal", True, tmp_path)
    alone = measured(model, rows, config)
    tables: list[torch.Tensor] = []

    def total(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return sum(tables[1:], start=tables[0])

    monkeypatch.setattr(distributed, "all_reduce_sum", total)
    found = {}
    for rank in range(world):
        monkeypatch.setattr(log, "rank_and_world_size", lambda rank=rank: (rank, world))
        found = measured(model, rows, config)
    assert len(tables) == world and all(not table.all() for table in tables), "each computed a share"
    assert found == alone


def test_where_memory_is_short_halves_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, config, _ = rows_for("causal", False, tmp_path)
    alone, plain, sizes = measured(model, rows, config), validation._loss_sums_at_once, []

    def short(model: torch.nn.Module, batch: dict[str, torch.Tensor], config: Config, most: int = 2) -> object:
        if len(batch["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch["input_ids"]))
        return plain(model, batch, config)

    monkeypatch.setattr(validation, "_loss_sums_at_once", short)
    found = measured(model, rows, config, micro=8)
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert found["value"] == pytest.approx(alone["value"], rel=1e-6) and found["tokens"] == alone["tokens"]
    monkeypatch.setattr(validation, "_loss_sums_at_once", lambda *arguments: short(*arguments, most=0))
    with pytest.raises(UserError, match="out of GPU memory while computing the loss of a single row"):
        measured(model, rows, config)


def test_numbers_that_are_not_finite_are_none(tmp_path: Path) -> None:
    model, rows, config, _ = rows_for("causal", False, tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)  # type: ignore[operator]
    found = measured(model, rows, config)
    assert found["value"] is None and found["perplexity"] is None and found["rows"] == 11


@pytest.fixture
def prepared(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A prepared config of one of the methods, with dropout wherever there is any."""
    monkeypatch.setenv("FTLIB_RUNS", "")

    def prepare(kind: str) -> Path:
        adapter, *replacements = KINDS[kind]
        config = rewrite(write_config(adapter), *[pair for pair in replacements if pair[0]])
        assert ftlib("prepare", config)[0] == 0
        return config

    return prepare


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "loss" in line]


def valid_of(run: Run) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "split" in line]


def result_files(run: Run) -> dict[str, bytes]:
    folder = next(path for path in (run.folder / "model", run.folder / "adapter") if path.exists())
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.COMPLETE_MARKER}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind not in ("full", "lora"))) for kind in KINDS]
)
def test_training_does_not_notice_and_whatever_interrupts_it_the_same_numbers(
    prepared: Callable[..., Path], kind: str, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in ("qlora", "int8"):
        pytest.importorskip("bitsandbytes")
    config = prepared(kind)
    without = run_of(config, tmp_path / "without")
    assert ftlib("train", config)[0] == 0
    straight = run_of(config, tmp_path / "straight", "evaluation.loss=true")
    assert straight.folder.name == without.folder.name, "the same run"
    code, _, error = ftlib("train", config, "evaluation.loss=true")
    assert code == 0 and "step 12: loss on valid " in error and "perplexity" in error, error
    assert steps_of(straight) == steps_of(without) and result_files(straight) == result_files(without)
    found = valid_of(straight)
    assert [(line["step"], line["split"], line["metric"], line["rows"]) for line in found] == [
        (step, "valid", "loss", 12) for step in (3, 6, 9, 12)
    ]
    assert len({line["value"] for line in found}) == 4
    assert all(line["perplexity"] == pytest.approx(math.exp(line["value"])) for line in found)
    broken = run_of(config, tmp_path / "broken", "evaluation.loss=true")
    plain = validation._loss_sums
    for call in (2, 8, 13):  # within the first, the second but one, the last, of six batches each
        with monkeypatch.context() as patch:
            patch.setattr(validation, "_loss_sums", dying(plain, call))
            assert ftlib("train", config, "evaluation.loss=true")[0] == 130
    assert ftlib("train", config, "evaluation.loss=true")[0] == 0
    assert lines(broken) == lines(straight) and result_files(broken) == result_files(without)


def test_a_signal_ends_it_at_once_and_a_kill_loses_one_computation(
    prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib
) -> None:
    config = prepared("lora")
    straight = run_of(config, tmp_path / "straight", "evaluation.loss=true")
    assert ftlib("train", config, "evaluation.loss=true")[0] == 0
    broken = run_of(config, tmp_path / "broken", "evaluation.loss=true")
    for call, name, expected in ((3, "SIGUSR1", 75), (4, "SIGKILL", -signal.SIGKILL), (9, "SIGTERM", 75)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED_IN_A_BATCH, str(call), name, config, "evaluation.loss=true"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr
    assert [line["step"] for line in valid_of(broken)] == [3]
    assert ftlib("train", config, "evaluation.loss=true")[0] == 0
    assert lines(broken) == lines(straight) and result_files(broken) == result_files(straight)


def test_without_dropout_the_loss_of_the_training_rows_is_training_s_first(
    prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, shared: Path
) -> None:
    """One step over all rows at a rate of nearly nothing: what it logs is what is computed behind it."""
    base = tmp_path / "no-dropout"
    base.mkdir()
    for file in (shared / "model").iterdir():
        text = file.read_bytes().replace(b'"attention_dropout": 0.1', b'"attention_dropout": 0.0')
        (base / file.name).write_bytes(text)
    config = rewrite(prepared("full"), (str(shared / "model"), str(base)))
    tiny = ["training.max_steps=1", "training.per_device_train_batch_size=36", "training.gradient_accumulation_steps=1"]
    until = "{split: train, metric: loss, at_most: 1.0e-9}"
    rounds = ["rounds=[{learning_rate: 1.0e-12}, {learning_rate: 1.0e-12, until: " + until + "}]"]
    config = rewrite(config, ("  learning_rate: 1.0e-2\n", ""))
    run = run_of(config, tmp_path / "runs", *tiny, *rounds)
    code, _, error = ftlib("train", config, *tiny, *rounds)
    assert code == 0, error
    first, found = steps_of(run)[0], valid_of(run)[0]
    assert (found["split"], found["rows"]) == ("train", 36)
    assert found["value"] == pytest.approx(first["loss"], rel=1e-5)
    told = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "round"]
    assert [line["converged"] for line in told] == [False, False] and told[0]["value"] == found["value"]


def test_the_lowest_loss_becomes_the_result(
    prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, monkeypatch
) -> None:
    """Values are dictated: the second is the lowest, the next two are in vain, and so the round ends early."""
    from ftlib.training import eval_callback

    best = ["checkpoint={steps: 1, keep: 1, best: {metric: loss, every: 2, patience: 2}}", "evaluation.loss=true"]
    config = prepared("lora")
    run = run_of(config, tmp_path / "runs", *best)
    values = iter([0.9, 0.4, None, 0.4, 0.1])
    monkeypatch.setattr(
        eval_callback, "split_loss", lambda *_: {"value": next(values), "perplexity": 2.0, "rows": 12, "tokens": 24}
    )
    code, _, error = ftlib("train", config, *best)
    assert code == 0, error
    assert [(line["step"], line["value"]) for line in valid_of(run)] == [(2, 0.9), (4, 0.4), (6, None), (8, 0.4)]
    assert files.read_json(run.done_marker)["best"] == {"step": 4, "metric": "loss", "value": 0.4}
    assert {path.name for path in run.checkpoint_root().iterdir()} == {"checkpoint-4", "checkpoint-8"}
    assert len(steps_of(run)) == 8 and outcome_files(run)


def test_only_what_changes_the_result_names_the_run(prepared: Callable[..., Path], tmp_path: Path) -> None:
    config = prepared("lora")
    best, steps = "checkpoint.best={metric: loss, every: 4}", "evaluation.max_new_tokens=9"

    def name(*overrides: str) -> str:
        return run_of(config, tmp_path / "runs", *overrides).folder.name

    assert name() == name("evaluation.loss=true") == name(steps)
    assert name() != name(best) == name(best, "evaluation.loss=true") == name(best, steps)
    rounds = load_experiment(config, [ROUNDS, "training={max_steps: 3}"], find_site()).config
    assert identity_fields(rounds, 0)["rounds"][1]["until"] == UNTIL
    asked = best.replace("loss", "accuracy")
    assert name(asked) not in (name(best), name(asked, steps))


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("{metric: loss, at_least: 1.0}", "rounds.1.until: lower loss is better"),
        ("{metric: accuracy, at_most: 1.0}", "rounds.1.until: higher accuracy is better"),
        ("{metric: loss}", "set at_least, or at_most if lower is better"),
        ("{metric: loss, at_least: 1.0, at_most: 2.0}", "set at_least, or at_most"),
    ],
)
def test_a_bound_on_the_wrong_side_is_refused(
    prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, until: str, message: str
) -> None:
    config = rewrite(prepared("lora"), ("  learning_rate: 1.0e-2\n", ""))
    os.environ["FTLIB_RUNS"] = str(tmp_path / "runs")
    rounds = "rounds=[{learning_rate: 1.0}, {learning_rate: 2.0, until: " + until + "}]"
    code, _, error = ftlib("train", config, rounds)
    assert code == 2 and message in error


def test_an_error_rate_is_minimised(prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, monkeypatch) -> None:
    from dataclasses import replace

    from ftlib.core import registry
    from tests.training.test_eval_callback import dictate

    entry = registry.TASKS["classify"]
    errors = {**entry.metrics, "accuracy": {"higher_is_better": False}}
    monkeypatch.setitem(registry.TASKS, "classify", replace(entry, metrics=errors))
    best = "checkpoint={steps: 1, keep: 1, best: {metric: accuracy, every: 3, patience: 2}}"
    config = prepared("lora")
    run = run_of(config, tmp_path / "runs", best)
    dictate(monkeypatch, [0.5, 0.2, 0.6, 0.3])
    assert ftlib("train", config, best)[0] == 0
    assert files.read_json(run.done_marker)["best"]["step"] == 6


def test_valid_rows_that_no_loss_is_of_are_found_before_training(
    prepared: Callable[..., Path], tmp_path: Path, ftlib: Ftlib
) -> None:
    config = prepared("lora")
    site = find_site()
    experiment = load_experiment(config, [], site)
    inputs = model_family("paligemma").load_processor(Path(experiment.config.model.base), experiment.config)
    rows = open_prepared(experiment.config, site).rows("valid")
    prompt, answer = inputs.token_lengths([rows[0].prefix], [rows[0].suffix])[0]
    short = [f"model.max_length={prompt + answer - 1}", "evaluation.loss=true", "model.too_long=stop"]
    os.environ["FTLIB_RUNS"] = str(tmp_path / "runs")
    code, _, error = ftlib("train", config, *short)
    assert code == 2 and "tokens, the maximum is" in error
    code, _, error = ftlib("train", config, *short[:2])
    assert code == 2 and "none of the 12 valid rows fits into" in error
    empty = "data.split={valid: 0.2, test: 0.2, max_eval: 1}"
    assert ftlib("prepare", config, empty)[0] == 0
    run = run_of(config, tmp_path / "runs", empty)
    assert ftlib("train", config, empty, "evaluation.loss=true")[0] == 0
    assert {line["rows"] for line in valid_of(run)} == {1}
