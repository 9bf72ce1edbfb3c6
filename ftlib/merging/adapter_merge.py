"""Exact weighted sums of LoRA adapters as one adapter: Σ c·s·B·A is the product of the concatenated factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftlib.core import files
from ftlib.errors import UserError
from ftlib.merging import methods
from ftlib.merging.deltas import LoraAdapter
from ftlib.merging.plan import PlannedTensor
from ftlib.merging.recipe import BASE, MERGED, Recipe


def write_adapter(
    folder: Path,
    recipe: Recipe,
    weights: Sequence[PlannedTensor],
    adapters: Sequence[LoraAdapter],
    labels: Sequence[str],
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the rank of a layer is the sum of the adapters' ranks.

    Raises:
        UserError: an adapter has updates that are not plain products of factors.
    """
    for label, adapter in zip(labels, adapters, strict=True):
        _reject_unsupported(label, adapter)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for weight in weights:
        shares = _shares(recipe, weight, len(adapters))
        taking = [(a, share) for a, share in zip(adapters, shares, strict=True) if share and weight.name in a.low_rank]
        if taking:
            module = taking[0][0].names[weight.name]
            left, right = concatenate_factors(weight.name, taking)
            tensors.update(_peft_tensors(module, left, right, taking[0][0], weight.name))
            ranks[module] = left.shape[1]
    if not tensors:
        raise UserError("this merge uses no layer's update, so the adapter would be empty")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "adapter_config.json", _config(recipe, adapters[0].config, ranks))


def _reject_unsupported(label: str, adapter: LoraAdapter) -> None:
    if adapter.tied:
        problem = f"{label}: its head is tied to its embeddings"
    elif adapter.full_tensors:
        problem = f"{label}: it contains whole weights ({min(adapter.full_tensors)})"
    elif any(factors.magnitude is not None for factors in adapter.low_rank.values()):
        problem = f"{label}: it is a DoRA adapter, and sums of these are not DoRA adapters"
    else:
        return
    raise UserError(f"form adapter: {problem}", "Set form model.")


def _shares(recipe: Recipe, weight: PlannedTensor, models: int) -> list[float]:
    """Return the factor of every adapter's update."""
    if weight.source == BASE:
        return [0.0] * models
    if weight.source != MERGED:
        return [float(number == weight.source) for number in range(models)]
    settings = recipe.resolved
    return methods.coefficients(recipe.weights, settings.get("normalize", "weights"), settings.get("scale", 1.0))


def concatenate_factors(name: str, taking: Sequence[tuple[LoraAdapter, float]]) -> tuple[Tensor, Tensor]:
    """Return factors of Σ c·ΔW, shapes (rows, Σ r) and (Σ r, columns); the scales are in the left factor."""
    factors = [(adapter.low_rank[name], share) for adapter, share in taking]
    left = torch.cat([each.left * (each.scale * share) for each, share in factors], dim=1)
    return left, torch.cat([each.right for each, _ in factors], dim=0)


def _peft_tensors(module: str, left: Tensor, right: Tensor, like: LoraAdapter, name: str) -> Mapping[str, Tensor]:
    """Return the factors as PEFT stores them; embeddings and Conv1D are transposed."""
    factors = like.low_rank[name]
    a, b = (left.T, right.T) if factors.transposed else (right, left)
    prefix = f"base_model.model.{module}"
    if factors.embedding:
        return {f"{prefix}.lora_embedding_A": a.contiguous(), f"{prefix}.lora_embedding_B": b.contiguous()}
    return {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.contiguous()}


def _config(recipe: Recipe, first: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return adapter_config.json with α = r for all layers, so that the scale is 1."""
    rank = max(ranks.values())
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": recipe.base,
        "revision": recipe.revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "bias": "none",
        "inference_mode": True,
    }
