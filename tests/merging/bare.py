"""Small models as bare folders of safetensors, on a grid where float32 sums and differences are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ftlib.core.paths import Site
from ftlib.merging.merge import merge
from ftlib.merging.recipe import Recipe

SHAPES = {
    "model.embed_tokens.weight": (41, 8),
    "model.layers.0.self_attn.q_proj.weight": (16, 24),
    "model.layers.0.norm.weight": (13,),
    "model.layers.1.self_attn.q_proj.weight": (16, 24),
    "model.layers.1.conv.weight": (6, 3, 2, 2),
    "model.norm.weight": (5,),
    "lm_head.weight": (41, 8),
}
Weights = dict[str, np.ndarray]


def random_weights(seed: int) -> Weights:
    """Multiples of 1/1024 in [-1, 1]."""
    draw = np.random.default_rng(seed)
    return {name: draw.integers(-1024, 1025, shape) / 1024 for name, shape in SHAPES.items()}


def tuned(base: Weights, seed: int) -> Weights:
    """The base with updates that are multiples of 2^-20: some are equal in size, some zero."""
    draw = np.random.default_rng(seed)
    return {name: value + draw.integers(-200, 201, value.shape) * 2.0**-20 for name, value in base.items()}


def save(
    folder: Path, weights: Weights, dtype: torch.dtype = torch.float32, rename: tuple[str, str] = ("", "")
) -> Path:
    """A bare folder with one file."""
    folder.mkdir(parents=True)
    tensors = {name.replace(*rename, 1): torch.tensor(value).to(dtype) for name, value in weights.items()}
    save_file(tensors, folder / "weights.safetensors")
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of a folder's files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def run(folder: Path, models: list[Any], **fields: Any) -> dict[str, torch.Tensor]:
    """Merge models of a folder over its `base`; a model is a name or (name, weight)."""
    pairs = [model if isinstance(model, tuple) else (model, 1.0) for model in models]
    entries = [{"model": str(folder / name), "weight": weight} for name, weight in pairs]
    recipe = {"base": str(folder / "base"), "models": entries, "output": str(folder / "out"), **fields}
    return load(merge(Recipe.model_validate(recipe), Site(folder / "store", folder / "runs")))
