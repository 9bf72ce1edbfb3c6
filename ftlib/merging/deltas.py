"""What a fine-tuned model changed of its base: full checkpoints and PEFT adapters behind one interface.

An adapter's update of a layer is ΔW = scale·B·A in float32 (Hu et al. 2021, arXiv:2106.09685), with scale α/r or
α/√r (rsLoRA, arXiv:2312.03732); DoRA (arXiv:2402.09353) turns W + ΔW to rows of its own length. Factors are multiplied
row block by row block, so that no update is ever held whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ftlib import files
from ftlib.errors import UserError
from ftlib.merging.names import canonical, part_of
from ftlib.merging.tensors import Stored, open_weights, same

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA works on some tokens only",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "replicated layers are not in the base",
    "lora_bias": "lora_bias adds biases that the base lacks",
    "monteclora_config": "MonteCLoRA draws its factors",
    "target_parameters": "target_parameters adapts parameters that are no layers' weights",
    "trainable_token_indices": "trainable_token_indices changes single rows of the embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA pools its inputs",
    "velora_config": "VeLoRA",
}
"""Settings of PEFT's LoraConfig under which an update is not scale·B·A."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's own weights; such an adapter is meaningless over the original base."""

_HALF = {"relative": 2**-8, "absolute": 2**-24}
"""How far bfloat16 and float16 are from what they round."""


class Tuned(Protocol):
    """A fine-tuned model, seen from its base."""

    def changes(self, name: str) -> bool:
        """Whether a weight (canonical name) may differ from the base's."""

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        """Its float32 rows from `start` on, for the base's rows there; both of shape (rows, columns)."""

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        """`value` minus `base`."""


def canonical_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by its canonical name.

    Raises:
        UserError: two stored names mean the same weight.
    """
    found: dict[str, Stored] = {}
    for name, tensor in open_weights(folder).items():
        key = canonical(name)
        if key in found:
            raise UserError(f"{folder}: two of its weights are called {key}, one of them {name}")
        found[key] = tensor
    return found


@dataclass(frozen=True)
class Checkpoint:
    """All weights of a model."""

    tensors: dict[str, Stored]

    def changes(self, name: str) -> bool:
        return True

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        return self.tensors[name].read(start, start + len(base)).float()

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        return self.value(name, start, base).sub_(base)


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · left @ right.

    Attributes:
        left: float32 (rows of W, r).
        right: float32 (r, columns of W).
        magnitude: DoRA: the length of every row.
        embedding: whether it adapts embeddings; `flipped`: whether the stored factors give ΔW transposed.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None
    embedding: bool = False
    flipped: bool = False

    def update(self, start: int, base: Tensor) -> Tensor:
        """Its rows from `start` on."""
        rows = slice(start, start + len(base))
        product: Tensor = (self.left[rows] @ self.right).mul_(self.scale)
        if self.magnitude is None:
            return product
        turned = base + product
        length = torch.linalg.vector_norm(turned, dim=1, keepdim=True)
        return turned.mul_(self.magnitude[rows, None] / length).sub_(base)


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter.

    Attributes:
        low_rank: canonical name of a weight → its update.
        replaced: weights that it brings whole (modules_to_save, biases).
        names: canonical name of a weight → its module's name in the adapter's files.
        tied: whether it changes embeddings and head alike, which are one matrix in the base (ensure_weight_tying).
    """

    low_rank: dict[str, LowRank]
    replaced: dict[str, Stored]
    names: dict[str, str]
    config: dict[str, Any]
    tied: bool

    def changes(self, name: str) -> bool:
        return name in self.low_rank or name in self.replaced

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        if name in self.replaced:
            return self.replaced[name].read(start, start + len(base)).float()
        return base + self.low_rank[name].update(start, base) if name in self.low_rank else base.clone()

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        if name in self.low_rank:
            return self.low_rank[name].update(start, base)
        return self.value(name, start, base).sub_(base)


def open_adapter(folder: Path, base: dict[str, Stored]) -> Adapter:
    """Read a LoRA adapter; its factors are held in memory.

    Args:
        base: the base's weights by canonical name.

    Raises:
        UserError: another kind of adapter, or keys that do not fit the base, or copies of another base's weights.
    """
    config = files.read_json(folder / "adapter_config.json")
    _refuse_unsupported(folder, config)
    factors: dict[str, dict[str, Stored]] = {}
    names: dict[str, str] = {}
    replaced = {}
    tied = False
    for stored_name, tensor in open_weights(folder).items():
        module, kind = _split(stored_name)
        key = canonical(f"{module}.weight" if kind else stored_name)
        if kind:
            names[key] = module.removeprefix("base_model.model.")
        if config.get("ensure_weight_tying") and part_of(key) == "head" and key not in base:
            tied = True
            continue  # the embeddings' own once more
        _check_key(folder, stored_name, key, base, None if kind else tensor.shape)
        if kind:
            factors.setdefault(key, {})[kind] = tensor
        else:
            replaced[key] = tensor
    for key in factors.keys() & replaced.keys():
        _check_copy(folder, key, replaced.pop(key), base[key])
    if tied:
        _check_scales(folder, names, config)
    low_rank = {key: _low_rank(folder, names[key], group, base[key], config) for key, group in factors.items()}
    return Adapter(low_rank, replaced, names, config, tied)


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: an adapter of type {config.get('peft_type')}; only LoRA adapters can be merged")
    for field, reason in _UNSUPPORTED.items():
        if config.get(field):
            raise UserError(f"{folder}: this adapter cannot be merged: {reason} ({field})")
    how = str(config.get("init_lora_weights")).lower()
    if how.startswith(_CHANGES_BASE):
        problem = f"{folder}: init_lora_weights: {how} changed the weights of the base that it was trained on"
        raise UserError(problem, "Convert it to plain LoRA first: peft's save_pretrained(path_initial_model_for_…).")


def _split(name: str) -> tuple[str, str]:
    """(module, kind of factor) of a stored name; no kind: a whole weight."""
    words = name.split(".")
    for kind in _FACTORS:
        if kind in words:
            return ".".join(words[: words.index(kind)]), kind
    return name, ""


def _check_key(folder: Path, stored: str, key: str, base: dict[str, Stored], shape: tuple[int, ...] | None) -> None:
    if key not in base:
        hint = "The base's head is its embeddings." if part_of(key) == "head" else "Is it of another model?"
        raise UserError(f"{folder}: {stored} has no place in the base: there is no {key}", hint)
    if shape is not None and shape != base[key].shape:
        raise UserError(f"{folder}: {stored} has shape {list(shape)}, the base's has {list(base[key].shape)}")


def _check_copy(folder: Path, key: str, copy: Stored, base: Stored) -> None:
    """Beside the factors of embeddings and heads PEFT saves the weights that they adapt, in the type of training."""
    if not same(copy, base, **_HALF):
        problem = f"{folder}: beside its update of {key} it holds the weights that it was trained on, not the base's"
        raise UserError(problem, "Is it of another model?")


def _check_scales(folder: Path, names: dict[str, str], config: dict[str, Any]) -> None:
    """Heads share the factors of embeddings that they are tied to, but not their place in `alpha_pattern`."""
    modules = [module for key, module in names.items() if part_of(key) in ("embeddings", "head")]
    if len({_scale(config, module, 1) for module in modules}) > 1:
        raise UserError(f"{folder}: alpha_pattern sets apart embeddings and head, which are one matrix in the base")


def _low_rank(folder: Path, module: str, group: dict[str, Stored], base: Stored, config: dict[str, Any]) -> LowRank:
    embedding = "lora_embedding_A" in group
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [kind for kind in kinds if kind not in group]:
        raise UserError(f"{folder}: {module} lacks its {missing[0]}")
    if len(base.shape) != 2:
        raise UserError(f"{folder}: {module} is a convolution or the like; only adapters of linear layers are merged")
    a, b = (group[kind].read().float() for kind in kinds)
    flipped = embedding or (bool(config.get("fan_in_fan_out")) and (a.shape[1], b.shape[0]) == base.shape)
    left, right = (a.T.contiguous(), b.T.contiguous()) if flipped else (b, a)
    if (len(left), right.shape[1]) != base.shape or left.shape[1] != len(right):
        raise UserError(
            f"{folder}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)} do not fit the base's "
            f"{list(base.shape)}"
        )
    magnitude = group.get("lora_magnitude_vector")
    if magnitude and flipped:
        raise UserError(f"{folder}: {module}: DoRA on embeddings or transposed layers cannot be merged")
    lengths = magnitude.read().float().flatten() if magnitude else None
    return LowRank(left, right, _scale(config, module, len(a)), lengths, embedding, flipped)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


OPENERS: dict[str, Callable[[Path, dict[str, Stored]], Tuned]] = {
    "adapter": open_adapter,
    "model": lambda folder, base: Checkpoint(canonical_weights(folder)),
}
"""Kind of input → how its files are opened, given the base's weights."""
