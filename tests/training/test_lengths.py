"""Batches by length and of few shapes: the same steps, losses and gradients."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from ftlib.config import Config
from ftlib.data.examples import Example
from ftlib.models.causal import CausalInputs
from ftlib.models.families import Inputs
from ftlib.models.paligemma import PaliGemmaInputs
from ftlib.models.rows import Row
from ftlib.models.tiny import tiny_model, tiny_processor
from ftlib.models.tiny_neox import tiny_neox, tiny_tokenizer
from ftlib.training import arguments
from ftlib.training.batching import Draw, EffectiveBatches, TrainingRows
from ftlib.training.lengths import SHAPES, FewShapes, row_lengths
from ftlib.training.loss import Average, answer_loss, count_items

TEMPLATE = "{prefix}\n"


def family(name: str) -> tuple[torch.nn.Module, Inputs]:
    if name == "paligemma":
        processor = tiny_processor()
        return tiny_model(processor), PaliGemmaInputs(processor)
    tokenizer = tiny_tokenizer()
    return tiny_neox(tokenizer), CausalInputs(tokenizer, limit=60)


def rows_of(inputs: Inputs, images: bool, count: int = 12) -> tuple[list[Example], list[Row]]:
    draw = random.Random(0)
    examples = [Example(str(n), "", "p" * draw.randint(1, 50), "a" * draw.randint(1, 9)) for n in range(count)]
    picture = Image.new("RGB", (40, 40), "red") if images else None
    return examples, [inputs.train_row(f"{row.prefix}\n", picture, row.suffix) for row in examples]


def test_cutting_by_length_changes_no_step() -> None:
    lengths = [random.Random(row).randint(1, 50) for row in range(23)]

    draw = Draw([23], [1.0], 0)

    def steps(**settings: object) -> list[set[int]]:
        micro = list(EffectiveBatches(draw, effective=8, micro=2, seed=0, drop_last=False, **settings))  # type: ignore[arg-type]
        return [set().union(*map(set, micro[start : start + 4])) for start in range(0, len(micro), 4)]

    assert steps(lengths=lengths) == steps()
    first = list(EffectiveBatches(draw, effective=8, micro=2, seed=0, drop_last=False, lengths=lengths))[:4]
    seen = [lengths[row] for batch in first for row in batch]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_lengths_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    _, inputs = family(name)
    examples, rows = rows_of(inputs, images=name == "paligemma")
    kept = [5, 3, 11]
    found = row_lengths(examples, kept, TEMPLATE, inputs)
    assert found == [(len(rows[place].ids), rows[place].n_answer) for place in kept]
    assert TrainingRows(examples, tmp_path, TEMPLATE, inputs, kept, Draw([len(kept)], [1.0], 0)).lengths() == found


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_bucketed_is_unbucketed(name: str, average: Average) -> None:
    """12 rows as one batch against micro-batches of 3 by length in few shapes: loss and every gradient."""
    model, inputs = family(name)
    _, rows = rows_of(inputs, images=name == "paligemma")
    whole = inputs.batch(rows)
    expected = answer_loss(model, whole, average)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lengths = [(len(row.ids), row.n_answer) for row in rows]
    collate = FewShapes(inputs, lengths)
    items = count_items(whole["labels"], average)
    batches = EffectiveBatches(
        Draw([12], [1.0], 0), 12, 3, 0, drop_last=False, lengths=[tokens for tokens, _ in lengths]
    )
    losses, shapes = [], set()
    for places in batches:
        batch = collate([rows[place] for place in places])
        shapes.add((batch["input_ids"].shape[1], batch["labels"].shape[1]))
        losses.append(answer_loss(model, batch, average, items))
        losses[-1].backward()
    assert shapes <= set(collate.shapes.items()) and 1 < len(shapes) <= SHAPES
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
