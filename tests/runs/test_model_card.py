"""The model card tells base, data, method and scores, and nothing of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ftlib.config.loader import load_experiment
from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.runs.model_card import write_card
from tests.reports import fake_runs


def card(tmp_path: Path, *overrides: tuple[str, str], scored: bool = False, recipe: int = 0) -> str:
    site = Site(tmp_path / "home" / "store", tmp_path / "home" / "runs")
    text = fake_runs.CONFIG
    for old, new in overrides:
        assert old in text
        text = text.replace(old, new)
    run = fake_runs.new_run(site, tmp_path, text)
    fake_runs.train(run)
    run.log_event("start", step=30, attempt=0, recipe=recipe)
    config = load_experiment(run.config_file, [], site).config
    if scored:
        metrics = {"accuracy": {"value": 0.875, "interval": [0.5, 0.96875]}}
        scores = {"metric": "accuracy", "unit": "fraction", "n": 32, "metrics": metrics}
        files.write_json(run.evaluation_folder("jsonl", "valid", "after") / "scores.json", scores)
    write_card(run, config)
    return (run.result_folder(config.adapter.method) / "README.md").read_text()


def test_an_adapters_card(tmp_path: Path) -> None:
    text = card(tmp_path, ("ftlib/tiny-paligemma}", 'google/paligemma-3b-pt-224, revision: "abc"}'), scored=True)
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "base_model": "google/paligemma-3b-pt-224", "library_name": "peft", "pipeline_tag": "image-text-to-text",
    }  # fmt: skip
    assert "google/paligemma-3b-pt-224 at revision abc, trained for the task `classify`" in text
    assert "LoRA (rank 16, alpha 32, dropout 0) on attention, mlp, but for vision." in text
    assert "- train: 1,234 rows, fingerprint `feed0001`" in text
    assert "| jsonl | valid | accuracy | 0.8750 | 0.5000–0.9688 | 32 |" in text
    assert 'from_pretrained("google/paligemma-3b-pt-224", revision="abc")' in text and "PeftModel" in text
    assert "- num_train_epochs: 2" in text and "- rows a step: 4" in text
    assert str(tmp_path) not in text and "home" not in text


@pytest.mark.parametrize(
    ("adapter", "recipe", "sentence"),
    [
        (
            "{method: full}",
            2,
            "All weights, trained in float32 and saved in bfloat16. Recipe 2 (changed since: rows are read",
        ),
        ("{method: full}", 0, "All weights in bfloat16. Recipe 0 (changed since: full fine-tuning in bfloat16 trains"),
        (
            "{method: full, freeze: [vision], master_weights: false}",
            0,
            "All weights in bfloat16, but for vision. Recipe 0 (changed since: rows are read",
        ),
    ],
)
def test_a_card_tells_what_the_weights_were_trained_in(
    tmp_path: Path, adapter: str, recipe: int, sentence: str
) -> None:
    short = ("ftlib/tiny-paligemma}", "ftlib/tiny-paligemma, dtype: bfloat16}")
    assert sentence in card(tmp_path, short, ("{method: lora}", adapter), recipe=recipe)


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ("{method: lora}", "LoRA (rank 16, alpha 32, dropout 0) on attention, mlp."),
        ("{method: dora, freeze: [vision, embeddings]}", "on attention, mlp, but for embeddings."),
        ("{method: full, freeze: [projector, language]}", "All weights in float32, but for language."),
    ],
)
def test_a_text_models_card_names_no_part_that_it_does_not_have(tmp_path: Path, adapter: str, sentence: str) -> None:
    text = card(tmp_path, ("family: paligemma", "family: causal"), ("{method: lora}", adapter))
    assert sentence in text and "vision" not in text and "projector" not in text


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ("{method: full, freeze: [vision, projector]}", "All weights in float32, but for vision and projector."),
        (
            "{method: attention}",
            "The language model's attention weights in float32; everything else frozen in float32.",
        ),
    ],
)
def test_a_models_card_hides_where_its_base_lay(tmp_path: Path, adapter: str, sentence: str) -> None:
    local = ("ftlib/tiny-paligemma", f"{tmp_path}/home/me/secret-place/my-model")
    text = card(tmp_path, local, ("{method: lora}", adapter))
    assert "base_model:" not in text and sentence in text
    assert "library_name: transformers" in text and "PeftModel" not in text
    assert "## Scores" not in text
    assert "secret-place" not in text and str(tmp_path) not in text
