"""Adapters of embeddings and heads, as PEFT saves them, against the logits of PEFT's adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging.merge import merge
from ftlib.merging.recipe import Recipe

Merge = Callable[..., Path]
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def merged(tmp_path: Path) -> Merge:
    """Merge models of the test's folder over its `base`; the result's folder."""

    def run(*models: str, **fields: Any) -> Path:
        entries = [{"model": str(tmp_path / model)} for model in models]
        output = tmp_path / f"merged{len(list(tmp_path.iterdir()))}"
        recipe = {"base": str(tmp_path / "base"), "models": entries, "output": str(output), "method": "linear"}
        return merge(Recipe.model_validate({**recipe, **fields}), Site(tmp_path / "store", tmp_path / "runs"))

    return run


def make_base(folder: Path, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes)).save_pretrained(folder / "base")


def make_adapter(folder: Path, name: str, **settings: Any) -> torch.Tensor:
    """A random adapter, saved as PEFT does unless it is told otherwise; the logits of the adapted model."""
    torch.manual_seed(ord(name))
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, **settings))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder / name)
    logits = tuned.eval()(IDS).logits.detach()
    tuned.merge_and_unload().save_pretrained(folder / f"full_{name}")
    return logits


def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.detach()


def same_logits(result: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits_of(LlamaForCausalLM.from_pretrained(result)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("models", "fields"),
    [
        ("a", {}),
        ("ab", {"parts": {"embeddings": "a", "head": "b"}}),
        ("ab", {"method": "slerp"}),
        ("ab", {"method": "task_arithmetic"}),
    ],
)
def test_copies_of_what_they_adapt_count_for_nothing(
    tmp_path: Path, merged: Merge, models: str, fields: dict[str, Any]
) -> None:
    make_base(tmp_path, tied=False)
    for name in models:
        logits = make_adapter(tmp_path, name, target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    result = merged(*models, **fields)
    full = load_file(merged(*(f"full_{name}" for name in models), **fields) / "model.safetensors")
    for name, tensor in load_file(result / "model.safetensors").items():
        torch.testing.assert_close(tensor, full[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    if models == "a":
        same_logits(result, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_with_embeddings_of_its_own_it_stays_an_adapter(tmp_path: Path, merged: Merge, tied: bool) -> None:
    """With or without a copy beside them; a tied head stays the base's, as PEFT leaves it."""
    make_base(tmp_path, tied=tied)
    logits = make_adapter(tmp_path, "a", target_modules=["embed_tokens", "q_proj"])
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, merged("a", form="adapter"))
    torch.testing.assert_close(logits_of(loaded), logits, rtol=1e-4, atol=1e-5)


def test_copies_may_be_rounded_but_not_of_another_base(tmp_path: Path, merged: Merge) -> None:
    make_base(tmp_path, tied=False)
    logits = make_adapter(tmp_path, "a", target_modules=["embed_tokens"])
    path, name = tmp_path / "a" / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    weights = load_file(path)
    for dtype in (torch.bfloat16, torch.float16):
        save_file({**weights, name: weights[name].to(dtype)}, path)
        same_logits(merged("a"), logits)
    save_file({**weights, name: weights[name] * 1.01}, path)
    with pytest.raises(UserError, match="differs from the base"):
        merged("a")


EMBEDDINGS = {
    "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_apart_from_a_tied_head_are_refused(tmp_path: Path, merged: Merge, kind: str) -> None:
    make_base(tmp_path, tied=True)
    make_adapter(tmp_path, "a", **EMBEDDINGS[kind])
    make_adapter(tmp_path, "b", target_modules=["q_proj"])
    for models, fields in (
        ("a", {}),
        ("ba", {}),
        ("ab", {"parts": {"embeddings": "a"}}),
        ("ab", {"parts": {"embeddings": "merged"}}),
    ):
        with pytest.raises(UserError, match="it changes the embeddings but not the head"):
            merged(*models, **fields)
    for source in ("base", "b"):
        merged("a", "b", parts={"embeddings": source})
    merged("full_b")


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_and_tied_head_alike_are_merged(tmp_path: Path, merged: Merge, kind: str) -> None:
    make_base(tmp_path, tied=True)
    logits = make_adapter(tmp_path, "a", ensure_weight_tying=True, **EMBEDDINGS[kind])
    same_logits(merged("a"), logits)
    with pytest.raises(UserError, match="its head is tied to its embeddings"):
        merged("a", form="adapter")


def test_a_tied_head_with_a_scale_of_its_own_is_refused(tmp_path: Path, merged: Merge) -> None:
    make_base(tmp_path, tied=True)
    patterns = {"alpha_pattern": {"embed_tokens": 16}}
    make_adapter(tmp_path, "a", ensure_weight_tying=True, **EMBEDDINGS["lora"], **patterns)
    with pytest.raises(UserError, match="alpha_pattern differs for embeddings and head"):
        merged("a")


def test_an_adapter_of_a_tied_head_alone_is_refused(tmp_path: Path, merged: Merge) -> None:
    make_base(tmp_path, tied=True)
    make_adapter(tmp_path, "a", target_modules=["lm_head"])
    with pytest.raises(UserError, match="which has no lm_head") as error:
        merged("a")
    assert "base ties head and embeddings" in error.value.remedy
