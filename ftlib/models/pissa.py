"""PiSSA: LoRA whose factors start as the principal part of the weights (Meng et al. 2024, arXiv:2404.02948).

With W = U S V, A starts as √(S/scale)·V and B as U·√(S/scale), cut to rank r, and the layer computes with the
residual W - scale·B·A. The first start of a run stores A and B; every start computes the residual from the stored ones,
so that a resumed run continues with the same bits. The result is converted as PEFT documents it: the update of the
original base, scale·(B·A - B₀·A₀), is a plain LoRA adapter of rank 2r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlib.core import files
from ftlib.models.loading import device

_FACTORS = "factors.safetensors"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_initial_factors(adapted: torch.nn.Module, how: str, folder: Path) -> None:
    """Compute A and B for every adapted layer, on the GPU if there is one, and write them in float32 to a new folder.

    Args:
        how: `adapter.init_lora_weights`.
    """
    factors = {}
    for name, layer in _lora_layers(adapted):
        weight = _oriented(layer, layer.get_base_layer().weight.data).to(device(), torch.float32)
        rank, scale = layer.r["default"], layer.scaling["default"]
        if how == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank]
        else:
            left, values, right = torch.svd_lowrank(weight, rank, niter=int(how.rpartition("_")[2]))
            right = right.T
        root = (values / scale).sqrt()
        factors[f"{name}.lora_A.weight"] = (root[:, None] * right).cpu().contiguous()
        factors[f"{name}.lora_B.weight"] = (left * root).cpu().contiguous()
    with files.atomic_directory(folder) as temporary:
        save_file(factors, temporary / _FACTORS)


def apply_initial_factors(adapted: torch.nn.Module, folder: Path) -> None:
    """Set A and B of every adapted layer to the stored ones, and its weight to the residual, in the weight's type."""
    factors, threads = load_file(folder / _FACTORS), torch.get_num_threads()
    torch.set_num_threads(1)  # another number could give other bits
    try:
        with torch.no_grad():
            for name, layer in _lora_layers(adapted):
                a, b = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
                weight = layer.get_base_layer().weight
                weight.copy_(weight.cpu().float() - _oriented(layer, layer.scaling["default"] * (b @ a)))
    finally:
        torch.set_num_threads(threads)


def convert_saved_adapter(adapter: Path, factors: Path) -> None:
    """Turn a saved adapter over the residual into one of rank 2r over the original base, in place.

    Args:
        adapter: its folder.
        factors: the folder from `write_initial_factors`.
    """
    initial = load_file(factors / _FACTORS)
    weights, config = load_file(adapter / _WEIGHTS), files.read_json(adapter / _CONFIG)
    for name, now in weights.items():
        start = initial.get(name.removeprefix("base_model.model."))
        if start is not None:
            first = ".lora_A." in name
            weights[name] = torch.cat([now, start if first else -start], dim=0 if first else 1).contiguous()
    save_file(weights, adapter / _WEIGHTS, metadata={"format": "pt"})
    alpha = config["lora_alpha"] * (math.sqrt(2) if config["use_rslora"] else 2)
    files.write_json(adapter / _CONFIG, {**config, "r": 2 * config["r"], "lora_alpha": alpha})


def _lora_layers(adapted: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name in the base and layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _oriented(layer: Any, matrix: Tensor) -> Tensor:
    """The matrix as (outputs, inputs), or back: Conv1D stores it transposed."""
    return matrix.T if layer.fan_in_fan_out else matrix
