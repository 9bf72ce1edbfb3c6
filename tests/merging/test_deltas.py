"""What an adapter or a checkpoint changed, against PEFT's own merge and transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging import engine
from ftlib.merging.checkpoint_io import canonical_name
from ftlib.merging.merge import merge
from ftlib.merging.recipe import Recipe
from ftlib.models.loading import load_weights
from ftlib.models.registry import model_family
from ftlib.models.tiny import tiny_neox, tiny_tokenizer


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK", 5000)


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., Path]:
    """Merge models over a base; the result's folder."""

    def run(base: Path, *models: Path, **fields: Any) -> Path:
        entries = [{"model": str(model), "weight": fields.pop("weight", 1.0)} for model in models]
        recipe = {
            "base": str(base),
            "models": entries,
            "output": str(tmp_path / "merged"),
            "method": "linear",
            **fields,
        }
        return merge(Recipe.model_validate(recipe), Site(tmp_path / "store", tmp_path / "runs"))

    return run


def adapter(folder: Path, model: nn.Module, base: Path, seed: int = 1, **settings: Any) -> nn.Module:
    """A random adapter on a model, saved; PEFT's model is returned."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            step = torch.randn_like(parameter) * 0.1
            parameter.data.copy_(parameter.data.abs() + step.abs() if "magnitude" in name else parameter.data + step)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {canonical_name(name): tensor for name, tensor in model.state_dict().items()}


def check(result: Path, expected: nn.Module, original: nn.Module, atol: float = 1e-6) -> int:
    """Every weight of the result is the expected model's; how many differ from the original."""
    weights, base = named(expected), named(original)
    found = {canonical_name(name): tensor for name, tensor in load_file(result / "model.safetensors").items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    return sum(not torch.equal(found[name], base[name]) for name in found)


ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 5}},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "biases": {"r": 4, "lora_alpha": 8, "bias": "lora_only"},
    "whole": {"r": 2, "lora_alpha": 2, "modules_to_save": ["multi_modal_projector"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_peft_does(
    shared: Path, merged: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    everything = {"target_modules": ["q_proj", "v_proj", "up_proj", "fc1", "linear"]}
    if kind == "whole":
        everything["target_modules"].remove("linear")
    tuned = adapter(
        tmp_path / "a", load_weights(shared / "model", "float32"), shared / "model", **{**everything, **ADAPTERS[kind]}
    )
    result = merged(shared / "model", tmp_path / "a")
    expected = tuned.merge_and_unload()
    assert check(result, expected, load_weights(shared / "model", "float32")) >= 8
    load_weights(result, "float32")  # strictly


def test_embeddings_of_a_vision_language_model_stay_the_bases(
    shared: Path, merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = shared / "model"
    adapter(tmp_path / "a", load_weights(base, "float32"), base, r=2, target_modules=["embed_tokens", "q_proj"])
    result, plain = (load_file(folder / "model.safetensors") for folder in (merged(base, tmp_path / "a"), base))
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, result[name])}
    assert changed and all("q_proj" in name for name in changed)


def test_transposed_layers_of_gpt2(merged: Callable[..., Path], tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=20))
    model.save_pretrained(tmp_path / "base")
    settings = {
        "r": 4,
        "target_modules": ["c_attn", "c_proj", "lm_head"],
        "fan_in_fan_out": True,
        "init_lora_weights": True,
    }
    settings["target_modules"].remove("lm_head")
    tuned = adapter(tmp_path / "a", model, tmp_path / "base", **settings)
    result = merged(tmp_path / "base", tmp_path / "a")
    original = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    assert check(result, tuned.merge_and_unload(), original) == 2 * 3
    GPT2LMHeadModel.from_pretrained(result)


def test_an_adapter_is_merged_like_the_model_it_makes(
    shared: Path, merged: Callable[..., Path], tmp_path: Path
) -> None:
    """Factors on a coarse grid, so that base + ΔW is exact: TIES of adapters is TIES of full models, bit for bit."""
    model = load_weights(shared / "model", "float32")
    for parameter in model.parameters():
        parameter.data.copy_((parameter.data * 256).round() / 256)
    model.save_pretrained(tmp_path / "base")
    for number, name in enumerate("ab"):
        tuned = adapter(
            tmp_path / name, load_weights(tmp_path / "base", "float32"), tmp_path / "base", seed=number, r=4,
            lora_alpha=4, target_modules=["q_proj", "down_proj"],
        )  # fmt: skip
        for key, parameter in tuned.named_parameters():
            if "lora" in key:
                parameter.data.copy_((parameter.data * 32).round() / 32)
        tuned.save_pretrained(tmp_path / name, save_embedding_layers=False)
        tuned.merge_and_unload().save_pretrained(tmp_path / f"full_{name}")
    settings = {"method": "ties", "density": 0.3}
    adapters = load_file(merged(tmp_path / "base", tmp_path / "a", tmp_path / "b", **settings) / "model.safetensors")
    mixed = merged(tmp_path / "base", tmp_path / "a", tmp_path / "full_b", output=str(tmp_path / "mixed"), **settings)
    full = merged(
        tmp_path / "base", tmp_path / "full_a", tmp_path / "full_b", output=str(tmp_path / "full"), **settings
    )
    for name, tensor in load_file(full / "model.safetensors").items():
        assert torch.equal(tensor, adapters[name]), name
        assert torch.equal(tensor, load_file(mixed / "model.safetensors")[name]), name
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(not torch.equal(tensor, base[name]) for name, tensor in adapters.items()) == 6


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "layerswap"])
def test_a_weighted_sum_stays_an_adapter(
    shared: Path, merged: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """Factors side by side give the logits of the merged model; ranks and layers may differ between the adapters."""
    base = shared / "model"
    settings = {
        "a": {"r": 2, "target_modules": ["q_proj", "fc1"]},
        "b": {"r": 3, "target_modules": ["q_proj", "up_proj"]},
    }
    for number, (name, kind) in enumerate(settings.items()):
        adapter(tmp_path / name, load_weights(base, "float32"), base, seed=number, lora_alpha=5, **kind)
    fields: dict[str, Any] = {"method": method, "parts": {"vision": "merged"}, "weight": 0.7}
    fields.update({"task_arithmetic": {"lambda": 0.5}, "layerswap": {"layer": 0}}.get(method, {}))
    full = merged(base, tmp_path / "a", tmp_path / "b", **dict(fields))
    small = merged(base, tmp_path / "a", tmp_path / "b", form="adapter", output=str(tmp_path / "small"), **fields)
    loaded = peft.PeftModel.from_pretrained(load_weights(base, "float32"), small).merge_and_unload()
    assert check(full, loaded, load_weights(base, "float32")) == (8 if method != "layerswap" else 7)
    assert (small / "adapter_model.safetensors").stat().st_size < (full / "model.safetensors").stat().st_size / 10


def old_names(name: str) -> str:
    """As the released files name PaliGemma's weights."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_names(name: str) -> str:
    """As transformers names them in memory."""
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("rename", [old_names, new_names])
def test_any_naming_of_the_weights(
    shared: Path, merged: Callable[..., Path], tmp_path: Path, rename: Callable[[str], str]
) -> None:
    model = load_weights(shared / "model", "float32")
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(tmp_path / "a")
    plain = load_file(tmp_path / "a" / "model.safetensors")
    save_file({rename(name): t for name, t in plain.items()}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    parts = dict.fromkeys(("vision", "projector", "embeddings"), "merged")
    result = load_file(merged(shared / "model", tmp_path / "a", parts=parts) / "model.safetensors")
    assert result.keys() == plain.keys()
    assert all(torch.equal(result[name], plain[name]) for name in plain)
    renamed = {rename(name): tensor for name, tensor in load_file(shared / "model" / "model.safetensors").items()}
    (tmp_path / "base").mkdir()
    save_file(renamed, tmp_path / "base" / "model.safetensors")
    over = load_file(
        merged(tmp_path / "base", tmp_path / "a", output=str(tmp_path / "over"), parts=parts) / "model.safetensors"
    )
    assert over.keys() == renamed.keys()


def test_a_head_that_is_the_embeddings_may_be_stored_or_not(
    shared: Path, merged: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_file(shared / "model" / "model.safetensors")
    embeddings = next(name for name in model if "embed_tokens" in name)
    for name, head in (("a", model[embeddings].clone()), ("untied", model[embeddings] + 1)):
        (tmp_path / name).mkdir()
        save_file({**model, "language_model.lm_head.weight": head}, tmp_path / name / "model.safetensors")
    result = load_file(merged(shared / "model", tmp_path / "a") / "model.safetensors")
    assert result.keys() == model.keys()
    with pytest.raises(UserError, match="head differs from its embeddings"):
        merged(shared / "model", tmp_path / "untied", output=str(tmp_path / "x"))
    both = load_file(merged(tmp_path / "a", shared / "model", output=str(tmp_path / "y")) / "model.safetensors")
    assert torch.equal(both["language_model.lm_head.weight"], model[embeddings])


def test_a_causal_model_and_buffers_of_older_versions(merged: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_neox(tiny_tokenizer())
    model.save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data.add_(0.25)
    model.save_pretrained(tmp_path / "a")
    plain = load_file(tmp_path / "a" / "model.safetensors")
    buffers = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
    }
    save_file({**plain, **buffers}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    result = merged(tmp_path / "base", tmp_path / "a")
    loaded = model_family("causal").model_class.from_pretrained(result)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of its base"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_are_no_plain_updates_are_refused(
    shared: Path, merged: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = shared / "model"
    adapter(tmp_path / "a", load_weights(base, "float32"), base, r=2, target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        merged(base, tmp_path / "a")


def test_dora_stays_no_adapter_and_an_unknown_layer_is_named(
    shared: Path, merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = shared / "model"
    adapter(tmp_path / "a", load_weights(base, "float32"), base, r=2, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(UserError, match="DoRA"):
        merged(base, tmp_path / "a", form="adapter")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not match the base, which has no .*layers\.7\."):
        merged(base, tmp_path / "a")
