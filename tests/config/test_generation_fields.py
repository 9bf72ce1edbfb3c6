"""Settings of generation: checked without transformers, and named as transformers names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.config.hf_fields import FIELDS, FTLIB_GENERATION_FIELDS, find_generation_error
from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core.paths import Site
from ftlib.errors import UserError

BASE = """\
name: x
task: instruct
model: {family: causal, base: some/model}
adapter: {method: lora}
data: {source: jsonl, root: /data}
"""
SEED_003 = {"do_sample": True, "temperature": 0.7, "top_p": 0.75, "top_k": 40, "repetition_penalty": 1.05, "seed": 1}


def config(folder: Path, *overrides: str, text: str = BASE) -> Config:
    (folder / "x.yaml").write_text(text)
    return load_experiment(folder / "x.yaml", overrides, Site(folder, folder), {}).config


def test_the_fields_are_those_of_the_installed_transformers() -> None:
    from transformers import GenerationConfig

    assert set(FIELDS) - set(FTLIB_GENERATION_FIELDS) <= set(GenerationConfig().to_dict())
    GenerationConfig(
        **{name: value for name, value in SEED_003.items() if name not in FTLIB_GENERATION_FIELDS}
    ).validate(strict=True)


def test_length_and_beams_may_stand_in_either_place(tmp_path: Path) -> None:
    found = config(tmp_path, "evaluation.generation={max_new_tokens: 256, num_beams: 2, no_repeat_ngram_size: 3}")
    assert (found.evaluation.max_new_tokens, found.evaluation.num_beams) == (256, 2)
    assert found.evaluation.generation == {"no_repeat_ngram_size": 3}
    assert config(tmp_path, "evaluation.max_new_tokens=7").evaluation.max_new_tokens == 7
    with pytest.raises(UserError, match=r"generation\.max_new_tokens is 8, but max_new_tokens is 7; set one of them"):
        config(tmp_path, "evaluation.generation={max_new_tokens: 8}", "evaluation.max_new_tokens=7")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 0.7}, "temprature: unknown key; did you mean temperature?"),
        ({"output_scores": True}, "output_scores: unknown key"),
        ({"temperature": 0.7}, "temperature has no effect without do_sample: true"),
        ({"do_sample": True, "temperature": 0}, "temperature: must be greater than 0, got 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: must be at most 1, got 1.5"),
        ({"do_sample": True, "top_k": 4.5}, "top_k: must be a whole number, got 4.5"),
        ({"do_sample": "yes"}, "do_sample: must be true or false, got 'yes'"),
        ({"repetition_penalty": True}, "repetition_penalty: must be a number, got True"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: must be a number, got nan"),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
    ],
)
def test_mistakes_are_said(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    assert find_generation_error(fields) == words
    with pytest.raises(UserError) as error:
        config(
            tmp_path,
            text=BASE + f"evaluation:\n  generation: {{{', '.join(f'{k}: {v}' for k, v in fields.items())}}}\n",
        )
    assert f"evaluation: generation: {words}" in str(error.value).replace("'nan'", "nan")


def test_the_settings_of_a_note_are_taken() -> None:
    assert find_generation_error(SEED_003) is None and find_generation_error({}) is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.on=everything", "model.family=paligemma"], "require model.family: causal"),
        (["loss.packing=true", "loss.average=example"], "packed rows cannot be averaged per row"),
        (["model.dtype=float16", "adapter={method: full}"], "float16 weights cannot be trained"),
        (["data.prompt=chat", "model.family=paligemma"], "data.prompt: chat requires model.family: vlm, causal"),
        (["training.torch_compile=true", "model.family=vlm"], "torch_compile does not work with model.family: vlm"),
        (["evaluation={decode: choose, generation: {do_sample: true}}"], "generation requires decode: generate"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        config(tmp_path, *overrides)


def test_task_instruct_asks_in_alpacas_form_unless_told_otherwise(tmp_path: Path) -> None:
    assert config(tmp_path).data.prompt == "alpaca"
    assert config(tmp_path, "data.prompt=chat").data.prompt == "chat"
    assert config(tmp_path, "task=vqa").data.prompt == "{prefix}"
