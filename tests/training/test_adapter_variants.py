"""PiSSA, LoRA+ and modules_to_save: results are plain PEFT over the original base, merged and evaluated alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PaliGemmaForConditionalGeneration

from ftlib.config.schema import Lora
from ftlib.core import files, jsonl
from ftlib.models.adapters import prepare_for_training
from ftlib.models.loading import load_adapter, load_weights
from ftlib.models.pissa import apply_initial_factors, convert_saved_adapter, write_initial_factors
from ftlib.models.tiny import tiny_model, tiny_processor
from ftlib.training import train
from tests.models.test_adapters import batch_of, logits_of, train_a_little
from tests.models.tiny_causal import save
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]
FAMILY = {"paligemma": "paligemma", "gpt2": "causal"}
PISSA = "{method: lora, r: 4, alpha: 8, freeze: [], init_lora_weights: pissa}"
PROJECTOR = "{method: lora, r: 4, alpha: 8, modules_to_save: [projector]}"
EVERYTHING = PISSA.replace("freeze: []", "rslora: true, loraplus_lr_ratio: 4, modules_to_save: [projector]")


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"paligemma": shared / "model", "gpt2": save("gpt2", tmp_path_factory.mktemp("models") / "gpt2")}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_pissa_is_pefts_and_becomes_plain_lora(
    folders: dict[str, Path], name: str, rslora: bool, tmp_path: Path
) -> None:
    """gpt2's layers are stored transposed."""
    family, batch = FAMILY[name], batch_of(folders, name)
    base = logits_of(load_weights(folders[name], "float32", family).eval(), batch)
    settings = Lora(method="lora", r=4, alpha=8, rslora=rslora, freeze=[], init_lora_weights="pissa")
    model = prepare_for_training(load_weights(folders[name], "float32", family), settings, "b/b", family).eval()
    write_initial_factors(model, "pissa", tmp_path / "pissa")
    apply_initial_factors(model, tmp_path / "pissa")
    torch.testing.assert_close(logits_of(model, batch), base, rtol=1e-4, atol=1e-4)

    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=rslora, init_lora_weights="pissa", fan_in_fan_out=name == "gpt2",
        target_modules=model.peft_config["default"].target_modules,
    )  # fmt: skip
    theirs = dict(get_peft_model(load_weights(folders[name], "float32", family), config).named_parameters())
    for key, ours in model.named_parameters():
        if "base_layer.weight" in key:
            torch.testing.assert_close(ours, theirs[key], rtol=1e-4, atol=1e-5)

    assert train_a_little(model, batch)[-1] < 3
    trained = logits_of(model, batch)
    assert (trained - base).abs().max() > 0.05
    model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    convert_saved_adapter(tmp_path / "made", tmp_path / "pissa")
    again = load_adapter(load_weights(folders[name], "float32", family), tmp_path / "made").eval()
    torch.testing.assert_close(logits_of(again, batch), trained, rtol=1e-4, atol=1e-4)
    auto = PaliGemmaForConditionalGeneration if family == "paligemma" else AutoModelForCausalLM
    plain = PeftModel.from_pretrained(auto.from_pretrained(folders[name]), tmp_path / "made").eval()
    torch.testing.assert_close(logits_of(plain, batch), trained, rtol=1e-4, atol=1e-4)


def test_randomized_pissa_keeps_most_of_it(tmp_path: Path) -> None:
    def kept(how: str) -> float:
        settings = Lora(method="lora", r=4, targets=["mlp"], init_lora_weights=how)
        model = prepare_for_training(tiny_model(tiny_processor()), settings, "x")
        write_initial_factors(model, how, tmp_path / how)
        factors = load_file(tmp_path / how / "factors.safetensors")
        return sum(float(tensor.square().sum()) for tensor in factors.values())

    assert kept("pissa_niter_8") == pytest.approx(kept("pissa"), rel=0.02)


def test_the_residual_does_not_depend_on_threads(tmp_path: Path) -> None:
    settings = Lora(method="lora", r=4, freeze=[], init_lora_weights="pissa")
    found: list[dict[str, Tensor]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            model = prepare_for_training(tiny_model(tiny_processor()), settings, "x")
            if not found:
                write_initial_factors(model, "pissa", tmp_path / "pissa")
            apply_initial_factors(model, tmp_path / "pissa")
            assert torch.get_num_threads() == threads
            found.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("adapter", [EVERYTHING, PROJECTOR], ids=["everything", "projector"])
def test_a_run_is_plain_peft_and_merges(
    adapter: str, store: Path, write_config: Callable[..., Path], shared: Path, tmp_path: Path, ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What training computed at its end, the saved adapter over the original base, and the merged model."""
    config = write_config(adapter)
    run = run_of(config, tmp_path / "runs", "training.max_steps=6")
    batch = batch_of({"paligemma": shared / "model"}, "paligemma")
    seen: dict[str, Any] = {}
    publish = train._publish

    def keep(context: Any, trainer: Any, *others: Any) -> None:
        seen["trained"] = logits_of(trainer.model.eval(), batch)
        publish(context, trainer, *others)

    monkeypatch.setattr(train, "_publish", keep)
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, "training.max_steps=6")[0] == 0
    assert not run.initial_factors.exists()
    made = run.folder / "adapter"
    base = PaliGemmaForConditionalGeneration.from_pretrained(shared / "model").eval()
    assert (logits_of(base, batch) - seen["trained"]).abs().max() > 0.01
    plain = PeftModel.from_pretrained(base, made).eval()
    torch.testing.assert_close(logits_of(plain, batch), seen["trained"], rtol=1e-4, atol=1e-4)
    names = [name for name in load_file(made / "adapter_model.safetensors") if "projector" in name]
    assert names == [f"base_model.model.model.multi_modal_projector.linear.{kind}" for kind in ("bias", "weight")]

    both = ["--base", shared / "model", "--model", run.folder]
    assert ftlib("merge", *both, "--method", "linear", "-o", tmp_path / "m")[0] == 0
    merged = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits_of(merged, batch), seen["trained"], rtol=1e-4, atol=1e-4)
    assert ftlib("evaluate", run.folder, "--split", "valid")[0] == 0
    assert ftlib("evaluate", config, f"model.base={tmp_path / 'm'}", "name=merged", "--before")[0] == 0
    files_of = [(run.folder, "after"), (run.folder.parent.parent / "merged", "before")]
    one, other = (
        [line["prediction"] for line in jsonl.read_jsonl_log(next(root.rglob(f"{when}/predictions.jsonl")))]
        for root, when in files_of
    )
    assert len(one) == 12 and one == other
    card = (made / "README.md").read_text()
    assert "all weights of the projector" in card and ("saved as rank 8" in card) == (adapter == EVERYTHING)


def test_the_projector_trains_in_float32_and_is_saved_in_the_models_type(
    store: Path, write_config: Callable[..., Path], tmp_path: Path, ftlib: Ftlib
) -> None:
    asked = ("model.dtype=bfloat16", "training.bf16=true", "training.use_cpu=true", "training.max_steps=2",
             "parts={projector: {learning_rate_factor: 0.1}}")  # fmt: skip
    config = write_config(PROJECTOR)
    run = run_of(config, tmp_path / "runs", *asked)
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, *asked)[0] == 0
    kinds = {}
    for file in ("checkpoints/attempt-0/checkpoint-2/trainable.safetensors", "adapter/adapter_model.safetensors"):
        weights = load_file(run.folder / file)
        kinds[file] = {tensor.dtype for name, tensor in weights.items() if "projector" in name}
        assert {tensor.dtype for name, tensor in weights.items() if "lora_" in name} == {torch.float32}
    assert list(kinds.values()) == [{torch.float32}, {torch.bfloat16}]


def test_a_run_without_its_initial_factors_does_not_resume(
    store: Path, write_config: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(PISSA)
    run = run_of(config, tmp_path / "runs")
    assert ftlib("prepare", config)[0] == 0
    log_step = train._log_step

    def interrupt(run: Any, record: dict[str, Any], update: object) -> None:
        log_step(run, record, update)
        if record["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_log_step", interrupt)
    assert ftlib("train", config)[0] == 130
    assert files.is_complete(run.initial_factors)
    (run.initial_factors / "factors.safetensors").write_bytes(b"")
    code, _, error = ftlib("train", config)
    assert code == 2 and "missing or damaged, so it cannot resume" in error and "Traceback" not in error
