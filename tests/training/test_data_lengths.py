"""Batches by length and of few shapes: the same steps, losses and gradients."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ftlib.config.schema import Config
from ftlib.data.dataset import SplitRows
from ftlib.data.example import Example
from ftlib.models import lengths
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import EncodedExample
from ftlib.models.loss import Average, answer_loss, count_items
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.registry import InputProcessor
from ftlib.models.tiny import tiny_model, tiny_neox, tiny_processor, tiny_tokenizer
from ftlib.training import arguments, oom
from ftlib.training.data import (
    MAX_SHAPES,
    BucketedCollator,
    GlobalBatchSampler,
    MixtureSampler,
    SupervisedDataset,
    training_lengths,
)
from tests.conftest import LORA

TEMPLATE = "{prefix}\n"


def family(name: str) -> tuple[torch.nn.Module, InputProcessor]:
    if name == "paligemma":
        processor = tiny_processor()
        return tiny_model(processor), PaliGemmaInputProcessor(processor)
    tokenizer = tiny_tokenizer()
    return tiny_neox(tokenizer), CausalProcessor(tokenizer, max_length=60)


def rows_of(inputs: InputProcessor, images: bool, count: int = 12) -> tuple[list[Example], list[EncodedExample]]:
    draw = random.Random(0)
    name = "red.png" if images else ""
    examples = [Example(str(n), name, "p" * draw.randint(1, 50), "a" * draw.randint(1, 9)) for n in range(count)]
    picture = Image.new("RGB", (40, 40), "red") if images else None
    return examples, [inputs.encode_train(f"{row.prefix}\n", picture, row.suffix) for row in examples]


def test_cutting_by_length_changes_no_step() -> None:
    lengths = [random.Random(row).randint(1, 50) for row in range(23)]

    draw = MixtureSampler([23], [1.0], 0)

    def steps(**settings: object) -> list[set[int]]:
        micro = list(GlobalBatchSampler(draw, batch_size=8, micro_batch_size=2, seed=0, drop_last=False, **settings))  # type: ignore[arg-type]
        return [set().union(*map(set, micro[start : start + 4])) for start in range(0, len(micro), 4)]

    assert steps(lengths=lengths) == steps()
    first = list(GlobalBatchSampler(draw, batch_size=8, micro_batch_size=2, seed=0, drop_last=False, lengths=lengths))[
        :4
    ]
    seen = [lengths[row] for batch in first for row in batch]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_lengths_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    _, inputs = family(name)
    examples, rows = rows_of(inputs, images=name == "paligemma")
    kept = [5, 3, 11]
    found = training_lengths(examples, kept, TEMPLATE, inputs)
    assert found == [(len(rows[place].input_ids), rows[place].n_labels) for place in kept]
    assert (
        SupervisedDataset(examples, tmp_path, TEMPLATE, inputs, kept, MixtureSampler([len(kept)], [1.0], 0)).lengths()
        == found
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the answer of each row is tokenized to learn its length."""
    found: Counter[str] = Counter()
    real = PaliGemmaInputProcessor.token_lengths

    def token_lengths(
        self: PaliGemmaInputProcessor, prompts: Sequence[str], answers: Sequence[str], *images: Any
    ) -> list[tuple[int, int]]:
        found.update(f"{prompt}|{answer}" for prompt, answer in zip(prompts, answers, strict=True))
        return real(self, prompts, answers, *images)

    monkeypatch.setattr(PaliGemmaInputProcessor, "token_lengths", token_lengths)
    return found


EVERY_USER = ("batch.auto=true", "model.max_length=300", "training.max_steps=1")
"""plan, batch.auto, rows that are too long, and micro-batches cut by length."""


def test_every_row_is_measured_once_for_all_runs(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    measured: Counter[str],
) -> None:
    monkeypatch.setattr(oom, "gpu_memory_bytes", lambda: 1 << 40)
    config = write_config(LORA)
    code, out, _ = ftlib("prepare", config)
    assert code == 0 and not measured
    rows = [f"{row.prefix}|{row.suffix}" for row in SplitRows(Path(out.strip()) / "train")]
    code, _, error = ftlib("train", config, "seed=1", *EVERY_USER)
    assert code == 0 and "batch.auto: micro-batches of" in error, error
    assert sum(measured.values()) == len(rows), "once, for all that need it"
    measured.clear()
    assert ftlib("train", config, "seed=2", *EVERY_USER)[0] == 0
    assert ftlib("plan", config, "seed=3", *EVERY_USER, "--gpu", "12GiB")[0] == 0
    assert ftlib("train", config, "seed=1", "training.max_steps=1", "model.max_length=200")[0] == 0
    assert not measured and len(list(store.glob("lengths/*.npy"))) == 1, "another seed, another limit: the same rows"
    assert ftlib("train", config, "data.prompt=digit? {prefix}", "training.max_steps=1", "model.max_length=300")[0] == 0
    assert sum(measured.values()) == len(rows) and len(list(store.glob("lengths/*.npy"))) == 2, "another prompt"


def test_clean_removes_lengths_of_data_that_are_gone(
    store: Path, write_config: Callable[..., Path], ftlib: Callable[..., Any], measured: Counter[str]
) -> None:
    config, settings = write_config(LORA), ("training.max_steps=1", "model.max_length=300")
    assert ftlib("prepare", config)[0] == 0
    assert ftlib("train", config, *settings)[0] == 0
    (kept,) = store.glob("lengths/*.npy")
    code, prepared, _ = ftlib("prepare", config, "data.split.seed=5")
    assert code == 0 and ftlib("train", config, "data.split.seed=5", *settings)[0] == 0
    (other,) = set(store.glob("lengths/*.npy")) - {kept}
    for name in ("0123456789abcdef.npy", ".tmp-1", ".tmp-2", "notes.txt"):  # the first: as older versions named them
        (store / "lengths" / name).write_text("x")
    os.utime(store / "lengths" / ".tmp-1", (1, 1))  # of a writer that was killed
    stays = {kept.name, other.name, ".tmp-2", "notes.txt"}
    code, out, error = ftlib("clean", "--yes")
    assert code == 0 and "lengths of rows" in out, error
    assert {path.name for path in (store / "lengths").iterdir()} == stays
    shutil.rmtree(prepared.strip())
    assert ftlib("clean", next(store.glob("runs/**/config.yaml")).parent, "--yes")[0] == 0
    assert {path.name for path in (store / "lengths").iterdir()} == stays, "only a run was named"
    assert ftlib("clean", "--yes")[0] == 0
    assert {path.name for path in (store / "lengths").iterdir()} == stays - {other.name}


def test_where_lengths_cannot_be_kept_they_are_measured_once_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Counter[str]
) -> None:
    _, inputs = family("paligemma")
    examples, rows = rows_of(inputs, images=True)
    monkeypatch.setattr("os.access", lambda *given: False)
    for _ in range(2):
        found = lengths.cached_token_lengths(examples, TEMPLATE, inputs, tmp_path / "none" / "x.npy")
        assert found.sum(axis=1).tolist() == [len(row.input_ids) for row in rows]
    assert not (tmp_path / "none").exists() and sum(measured.values()) == len(examples)


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_bucketed_is_unbucketed(name: str, average: Average) -> None:
    """12 rows as one batch against micro-batches of 3 by length in few shapes: loss and every gradient."""
    model, inputs = family(name)
    _, rows = rows_of(inputs, images=name == "paligemma")
    whole = inputs.collate(rows)
    expected = answer_loss(model, whole, average)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lengths = [(len(row.input_ids), row.n_labels) for row in rows]
    collate = BucketedCollator(inputs, lengths)
    items = count_items(whole["labels"], average)
    batches = GlobalBatchSampler(
        MixtureSampler([12], [1.0], 0), 12, 3, 0, drop_last=False, lengths=[tokens for tokens, _ in lengths]
    )
    losses, shapes = [], set()
    for places in batches:
        batch = collate([rows[place] for place in places])
        shapes.add((batch["input_ids"].shape[1], batch["labels"].shape[1]))
        losses.append(answer_loss(model, batch, average, items))
        losses[-1].backward()
    assert shapes <= set(collate.shapes.items()) and 1 < len(shapes) <= MAX_SHAPES
    torch.testing.assert_close(torch.stack(losses).sum(), expected, rtol=1e-5, atol=1e-6)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5, msg=key)


def test_workers_on_a_gpu_and_none_where_the_cpus_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"name": "x", "task": "vqa", "model": {"family": "paligemma", "base": "b"}, "adapter": {"method": "full"}}
    config = Config.model_validate({**fields, "data": {"source": "jsonl", "root": "x"}, "job": {"cpus": 6}})
    assert arguments._workers(config) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)))
    assert arguments._workers(config)["dataloader_num_workers"] == 3
    chosen = config.model_copy(update={"training": {"dataloader_num_workers": 0}})
    assert arguments._workers(chosen) == {}
