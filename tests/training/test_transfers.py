"""The recipes of PaliGemma's authors: every file loads at every resolution and says what theirs say; one is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config, Full
from ftlib.core import jsonl
from ftlib.core.paths import Site
from tests.conftest import REPOSITORY
from tests.training.test_resume import run_of

FOLDER = REPOSITORY / "configs" / "paligemma_transfers"

AUTHORS = {
    ("cococap", 224): (1e-5, 1e-6, 256, 0.0, 0.0, 2), ("cococap", 448): (1e-5, 1e-6, 256, 0.0, 0.0, 2),
    ("textcaps", 224): (1e-5, 1e-6, 256, 0.0, 0.0, 3), ("textcaps", 448): (1e-5, 1e-6, 256, 0.0, 0.0, 3),
    ("screen2words", 224): (1e-5, 0.0, 256, 0.2, 0.3, 1), ("screen2words", 448): (1e-5, 0.0, 256, 0.2, 0.3, 1),
    ("vqav2", 224): (1e-5, 1e-6, 256, 0.0, 0.0, 1), ("vqav2", 448): (1e-5, 0.0, 256, 0.0, 0.0, 1),
    ("okvqa", 224): (5e-6, 0.0, 128, 0.0, 0.0, 1), ("okvqa", 448): (5e-6, 0.0, 128, 0.0, 0.0, 1),
    ("textvqa", 224): (3e-6, 0.0, 256, 0.0, 0.0, 1), ("textvqa", 448): (3e-6, 3e-7, 256, 0.0, 0.0, 1),
    ("textvqa", 896): (3e-6, 0.0, 256, 0.0, 0.0, 1),
    ("gqa", 224): (1e-5, 0.0, 256, 0.0, 0.0, 1), ("gqa", 448): (1e-5, 0.0, 256, 0.0, 0.0, 1),
    ("docvqa", 224): (1e-5, 1e-6, 256, 0.0, 0.0, 1), ("docvqa", 448): (1e-5, 1e-6, 256, 0.0, 0.0, 1),
    ("docvqa", 896): (1e-5, 1e-6, 256, 0.0, 0.0, 1),
    ("infovqa", 224): (1e-5, 1e-6, 256, 0.4, 0.0, 1), ("infovqa", 448): (1e-5, 1e-6, 128, 0.4, 0.0, 1),
    ("infovqa", 896): (3e-6, 3e-7, 32, 0.4, 0.0, 1),
    ("refcoco_seg", 224): (3e-5, 0.0, 256, 0.3, 0.1, 1), ("refcoco_seg", 448): (1e-5, 0.0, 256, 0.3, 0.0, 1),
    ("refcoco_seg", 896): (1e-5, 0.0, 64, 0.3, 0.0, 1),
}  # fmt: skip
"""(file, resolution) → rate, decay (in their `sweep_best`), batch, smoothing, dropout, beams."""


def recipes() -> Iterator[tuple[str, Config]]:
    """Every file, as it is and with the overrides of each of its comments for another resolution."""
    for path in sorted(FOLDER.glob("*.yaml")):
        lines = re.findall(r"^# At \d+: (.+)$", path.read_text(), re.MULTILINE)
        for overrides in ([], *(line.split() for line in lines)):
            yield path.stem, load_experiment(path, overrides, Site(Path("/store"), Path("/runs")), {}).config


def test_every_recipe_has_the_authors_numbers() -> None:
    found = {}
    for name, config in recipes():
        resolution = int(config.model.base.rpartition("-")[2])
        training, evaluation = config.training, config.evaluation
        rate, decay = training["learning_rate"], training.get("weight_decay", 0)
        assert (config.name, config.loss.average) == (f"transfer_{name}", "example")
        assert (training["lr_scheduler_type"], training["warmup_steps"], training["max_grad_norm"]) == (
            "cosine",
            0.05,
            1,
        )
        assert isinstance(config.adapter, Full) and config.adapter.master_weights
        assert config.adapter.freeze == (["vision", "projector"] if (name, resolution) == ("gqa", 448) else [])
        assert not decay or config.parts["language"].weight_decay == 0
        assert evaluation.generation == ({"length_penalty": 0.0} if evaluation.num_beams > 1 else {})
        # AdamW of torch multiplies weight_decay by the rate; big_vision does not.
        numbers = (rate, pytest.approx(decay * rate), config.effective_batch_size)
        found[name, resolution] = (*numbers, config.loss.label_smoothing, config.model.dropout, evaluation.num_beams)
    assert found == AUTHORS


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_its_source_and_is_in_the_docs(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# ftlib submit configs/paligemma_transfers/{path.name}\n")
    assert re.search(rf"# big_vision, configs/proj/paligemma/transfers/{path.name.replace('yaml', 'py')}, lines ", text)
    assert f"paligemma_transfers/{path.name}" in (REPOSITORY / "docs" / "methods.md").read_text()


def test_a_recipe_with_every_key_trains_and_is_evaluated_with_beams(
    store: Path, shared: Path, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = FOLDER / "screen2words.yaml"
    small = [
        f"model.base={shared}/model",
        "model.dtype=float32",
        f"data.root={shared}/data",
        "training.max_steps=2",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.weight_decay=0.1",
        "parts={language: {weight_decay: 0}, vision: {learning_rate_factor: 0.5}}",
        "evaluation={splits: [valid], max_new_tokens: 4, num_beams: 2, generation: {length_penalty: 0.0}}",
    ]
    run = run_of(recipe, tmp_path / "runs", *small)
    for command in ("prepare", "train"):
        code, _, error = ftlib(command, recipe, *small)
        assert code == 0, error
    assert [line["learning_rate"] for line in jsonl.read_jsonl_log(run.metrics)] == [0.0, 1e-5]
    assert load_file(run.folder / "model" / "model.safetensors")
    assert ftlib("evaluate", run.folder)[0] == 0
