"""torch.compile in training, by dynamo itself: a program for each shape however many there are, or a plain end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from PIL import Image
from torch._dynamo.utils import counters

from ftlib.config.schema import Config
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import dynamo_setting_name
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.paligemma import PaliGemmaInputProcessor, skip_image_token_count
from ftlib.models.registry import InputProcessor
from ftlib.models.tiny import tiny_model, tiny_neox, tiny_processor, tiny_tokenizer
from ftlib.training import arguments, compiling, data
from ftlib.training.data import MixtureSampler, SupervisedDataset
from ftlib.training.resume import TrainingPhase
from ftlib.training.trainer import ResumableTrainer

USUAL_LIMIT = 8


@pytest.fixture(autouse=True)
def usual_dynamo() -> Iterator[None]:
    """As in a new process: flex attention, used in another test, allows more programs from then on."""
    saved = torch._dynamo.config.save_config()
    setattr(torch._dynamo.config, dynamo_setting_name("recompile_limit", "cache_size_limit"), USUAL_LIMIT)
    counters.clear()
    yield
    torch._dynamo.config.load_config(saved)
    torch._dynamo.reset()


def family(name: str) -> tuple[Any, InputProcessor]:
    if name == "paligemma":
        processor = tiny_processor()
        return tiny_model(processor), PaliGemmaInputProcessor(processor)
    tokenizer = tiny_tokenizer()
    return tiny_neox(tokenizer), CausalProcessor(tokenizer, max_length=60)


def trainer_of(name: str, folder: Path, **sections: Any) -> tuple[ResumableTrainer, list[float]]:
    """A trainer over 44 rows of many lengths, two at once, and the list that its losses come to."""
    torch.manual_seed(0)
    model, inputs = family(name)
    skip_image_token_count(model)
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    draw, image = random.Random(0), "red.png" if name == "paligemma" else ""
    rows = [Example(str(n), image, "p" * draw.randint(1, 45), "a" * draw.randint(1, 9)) for n in range(44)]
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "max_steps": 11}
    fields = {
        "name": "x",
        "task": "caption" if name == "paligemma" else "instruct",
        "model": {"family": name, "base": "b"},
        "adapter": {"method": "lora", "r": 2, "targets": ["attention" if name == "paligemma" else "query_key_value"]},
        "data": {"source": "jsonl", "root": "/", "prompt": "{prefix}"},
        **sections,
        "training": {**training, **sections.get("training", {})},
    }
    config = Config.model_validate(fields)
    trainable = prepare_for_training(model, config.adapter, "b", name).train()
    built = arguments.build_training_arguments(config, folder, TrainingPhase())
    inputs.packing = config.loss.packing  # type: ignore[union-attr]
    dataset = SupervisedDataset(rows, folder, config.data.templates, inputs, range(44), MixtureSampler([44], [1.0], 0))
    trainer = ResumableTrainer(config, trainable, dataset, built, folder / "checkpoints", TrainingPhase())
    trainer._save_checkpoint = lambda model, trial: None  # type: ignore[method-assign]
    losses: list[float] = []
    trainer.on_step = lambda record: losses.append(record["loss"])
    return trainer, losses


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize(("name", "shapes"), [("paligemma", 4), ("causal", 12)])
def test_every_shape_is_compiled_in_one_piece(
    name: str, shapes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_SHAPES", shapes)
    plain, expected = trainer_of(name, tmp_path)
    plain.train()
    trainer, losses = trainer_of(name, tmp_path, training=COMPILED)
    collate, seen = trainer.data_collator, set()

    def noting(rows: Any) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(rows)
        seen.add(batch["input_ids"].shape)
        return batch

    trainer.data_collator = noting
    trainer.train()
    assert losses == pytest.approx(expected, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == len(seen)
    assert len(seen) > USUAL_LIMIT or shapes < USUAL_LIMIT
    assert not counters["graph_break"]


def test_packed_rows_need_few_programs(tmp_path: Path) -> None:
    trainer, losses = trainer_of("causal", tmp_path, training=COMPILED, loss={"packing": True})
    trainer.train()
    assert len(losses) == 11 and 1 < counters["stats"]["unique_graphs"] < compiling._ANY_SHAPE / 2


def test_training_ends_where_torch_would_go_on_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_SIZES_PER_SHAPE", 1)
    monkeypatch.setattr(compiling, "_SPARE_PROGRAMS", 1)
    trainer, losses = trainer_of("causal", tmp_path, training=COMPILED)
    trainer.data_collator = trainer.train_dataset.processor.collate  # of any shape
    with pytest.raises(UserError, match="would continue uncompiled"), compiling.limit_recompiles():
        trainer.train()
    assert counters["stats"]["unique_graphs"] == data.MAX_SHAPES and len(losses) < 11


def test_programs_of_an_earlier_model_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_SIZES_PER_SHAPE", 1)
    monkeypatch.setattr(compiling, "_SPARE_PROGRAMS", 1)
    for _ in range(2):
        trainer, losses = trainer_of("causal", tmp_path, training=COMPILED)
        trainer.train()
        assert len(losses) == 11


def test_what_is_asked_between_steps_is_compiled_as_usual(tmp_path: Path) -> None:
    """Questions have any length: with a program for each, asking would end the training."""
    trainer, _ = trainer_of("causal", tmp_path, training={**COMPILED, "max_steps": 2})
    seen = []

    def noting(record: dict[str, Any]) -> None:
        settings = torch._dynamo.config
        seen.append((settings.automatic_dynamic_shapes, settings.recompile_limit, settings.fail_on_recompile_limit_hit))

    trainer.on_step = noting
    trainer.train()
    assert seen == [(True, USUAL_LIMIT, False)] * 2 and counters["stats"]["unique_graphs"] > 1


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), compiling.limit_recompiles():
        raise ZeroDivisionError
