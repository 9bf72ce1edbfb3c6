"""Vision-language models with chat templates through every command, with images of many sizes.

Two architectures need no torchvision; the others run where FTLIB_TORCHVISION names a folder with it (make vlm).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ftlib.models.loading import load_weights
from ftlib.models.vlm import module_group
from tests.cli.test_export import loaded
from tests.conftest import FULL, LORA, REPOSITORY, read_lines
from tests.fake_hub import TOKEN, serving
from tests.models import tiny_vlm
from tests.models.test_vlm import ARCHITECTURES, require_packages
from tests.training.test_divergence import interrupted_after
from tests.training.test_resume import outcome, run_of

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    require_packages(request.param)
    tiny_vlm.save(request.param, tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def data(shared: Path, tmp_path: Path) -> Path:
    """The digits, enlarged to pictures of many sizes."""
    folder = tmp_path / "data"
    shutil.copytree(shared / "data", folder)
    for number, path in enumerate(sorted(folder.glob("images/*"))):
        with Image.open(path) as image:
            image.convert("RGB").resize((30 + 7 * (number % 9), 40 + 11 * (number % 5))).save(path)
    return folder


def config_of(write_config: Callable[..., Path], base: Path, data: Path, adapter: str) -> Path:
    path = write_config(adapter, str(base), str(data), ("family: paligemma", "family: vlm"))
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 6"))
    return path


def test_the_chain_is_resumed_bit_for_bit_and_its_result_is_plain(
    base: Path, data: Path, store: Path, tmp_path: Path, write_config: Callable[..., Path], ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = config_of(write_config, base, data, LORA)
    for command in ("stage", "prepare"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    code, planned, error = ftlib("plan", config, "--json", "--gpu", "4GiB", "batch.auto=true")
    assert code == 0, error
    tokens = np.load(next((store / "lengths").glob("*.npy"))).sum(axis=1)
    assert json.loads(planned)["rows"]["tokens"] == tokens.max()
    straight = run_of(config, tmp_path / "straight")
    code, _, error = ftlib("train", config)
    assert code == 0, error
    stopped = run_of(config, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("ftlib.training.train._log_step", interrupted_after(4))
        assert ftlib("train", config)[0] != 0
    assert ftlib("train", config)[0] == 0
    assert outcome(stopped) == outcome(straight)

    code, _, error = ftlib("evaluate", config)
    assert code == 0, error
    predictions = read_lines(next(stopped.folder.glob("eval/*/valid/after/predictions.jsonl")))
    assert len(predictions) == 12
    picture = sorted(data.glob("images/*"))[0]
    code, answer, error = ftlib(
        "predict", stopped.folder, "--image", picture, "--prompt", "which digit is this?", "--json"
    )
    assert code == 0, error
    assert json.loads(answer)[0]["answer"].strip() == plain_answer(base, stopped.folder / "adapter", picture).strip()
    assert ftlib("report", stopped.folder)[0] == 0

    merged = ["merge", "--base", base, "--method", "linear", "--model", stopped.folder, "--model", straight.folder]
    for words in (["export", stopped.folder], merged):
        whole = tmp_path / str(words[0])
        code, _, error = ftlib(*words, "-o", whole)
        assert code == 0, error
        model, processor = loaded(stopped.folder / "adapter" / "README.md", 1, {"FOLDER": whole})
        assert greedy(model.eval(), processor, picture).strip() == json.loads(answer)[0]["answer"].strip()


def plain_answer(base: Path, adapter: Path, picture: Path) -> str:
    """The greedy answer as a user without ftlib gets it."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(base, use_fast=False)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    return greedy(model, processor, picture)


def greedy(model: Any, processor: Any, picture: Path) -> str:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit is this?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    with Image.open(picture) as image:
        batch = processor(text=[text], images=[[image.convert("RGB")]], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
    return str(processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


SHIPPED = {
    "qwen3_vl": "vlm_qwen3_vl",
    "gemma3": "vlm_gemma3",
    "idefics3": "vlm_smolvlm",
    "internvl": "vlm_internvl",
    "llava_onevision": "vlm_llava_onevision",
}
"""Architecture → the config that is shipped for it."""


@pytest.mark.parametrize("base", [one for one in ARCHITECTURES if one.values[0] in SHIPPED], indirect=True)
def test_a_shipped_config_goes_through_every_command(
    base: Path, data: Path, store: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its method, task and image arguments, on a tiny model and few rows."""
    settings = yaml.safe_load((REPOSITORY / "configs" / f"{SHIPPED[base.name]}.yaml").read_text())
    settings["model"] |= {"base": str(base), "dtype": "float32"}
    settings["data"] |= {"root": str(data), "split": {"valid": 0.2, "test": 0.2}}
    few = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    checkpointing = settings["training"].get("gradient_checkpointing", False)
    settings["training"] = {**few, "warmup_steps": 2, "gradient_checkpointing": checkpointing}
    settings["evaluation"] |= {"max_new_tokens": 4}
    if settings["task"] == "detect":
        rows = read_lines(data / "data.jsonl")
        boxed = [{**row, "suffix": f"<loc0100><loc0200><loc0600><loc0700> {row['suffix']}"} for row in rows]
        (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxed))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    outputs = {}
    for command in ("stage", "prepare", "plan", "train", "evaluate"):
        code, outputs[command], error = ftlib(command, config)
        assert code == 0, error
    run = Path(outputs["train"].strip())
    for when in ("before", "after"):
        assert len(read_lines(next(run.glob(f"eval/*/valid/{when}/predictions.jsonl")))) == 12
    picture = sorted(data.glob("images/*"))[0]
    for words in (
        ["predict", run, "--image", picture, "--prompt", "which digit is this?"],
        ["report", run],
        ["export", run, "-o", tmp_path / "exported"],
        ["merge", "--base", base, "--method", "linear", "--model", run, "--model", run, "-o", tmp_path / "merged"],
    ):
        code, _, error = ftlib(*words)
        assert code == 0, error
    with serving(tmp_path / "hub", tmp_path, monkeypatch):
        (tmp_path / "token").write_text(TOKEN)
        code, _, error = ftlib("push", run, "--yes", "--to", "lab/vlm")
    assert code == 0, error
    pushed = tmp_path / "hub" / "pushed"
    assert any(pushed.glob("*model.safetensors"))
    card = (pushed / "README.md").read_text()
    for key, value in settings["model"].get("image_arguments", {}).items():
        assert key in card and str(value) in card
    assert load_weights(tmp_path / "exported", "float32", "vlm") and load_weights(tmp_path / "merged", "float32", "vlm")


@pytest.mark.parametrize("base", [one for one in ARCHITECTURES if one.values[0] not in SHIPPED], indirect=True)
def test_other_architectures_train_resume_and_evaluate(
    base: Path, data: Path, store: Path, tmp_path: Path, write_config: Callable[..., Path], ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In as few steps and rows as show it: two steps, interrupted behind the first, four rows of small images."""
    rows = read_lines(data / "data.jsonl")[:8]
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in data.glob("images/*"):
        with Image.open(path) as image:
            image.resize((40, 40)).save(path)
    config = config_of(write_config, base, data, LORA)
    few = ("max_steps: 6", "max_steps: 2"), ("test: 0.2", "test: 0"), ("steps: 3", "steps: 1")
    for old, new in (*few, ("max_new_tokens: 4", "max_new_tokens: 2")):
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    assert ftlib("prepare", config)[0] == 0
    straight = run_of(config, tmp_path / "straight")
    code, _, error = ftlib("train", config)
    assert code == 0, error
    stopped = run_of(config, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("ftlib.training.train._log_step", interrupted_after(1))
        assert ftlib("train", config)[0] != 0
    assert ftlib("train", config)[0] == 0
    assert outcome(stopped) == outcome(straight)
    code, _, error = ftlib("evaluate", config)
    assert code == 0, error
    assert len(read_lines(next(stopped.folder.glob("eval/*/valid/after/predictions.jsonl")))) == 2


def test_full_training_and_labels_chosen_by_likelihood(
    base: Path, data: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    """The frozen projector keeps its weights, every other part changes; the result is a whole model."""
    config = config_of(write_config, base, data, FULL)
    config.write_text(config.read_text().replace("splits: [valid]", "splits: [valid], decode: choose"))
    for command in ("stage", "prepare", "train", "evaluate"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    (run,) = (store / "runs").glob("*/tiny/*")
    assert len(read_lines(next(run.glob("eval/*/valid/after/predictions.jsonl")))) == 12
    before, after = (load_weights(folder, "float32", "vlm") for folder in (base, run / "model"))
    changed = {
        module_group(before, name)
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"vision", "embeddings", "language"}
