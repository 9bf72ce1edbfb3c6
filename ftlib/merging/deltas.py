"""Task vectors: the difference of a fine-tuned model to its base, for full checkpoints and PEFT adapters.

An adapter's update of a layer is ΔW = scale·B·A in float32 (Hu et al. 2021, arXiv:2106.09685), with scale α/r or
α/√r (rsLoRA, arXiv:2312.03732); DoRA (arXiv:2402.09353) rescales the rows of W + ΔW to trained lengths. Factors are
multiplied by
blocks of rows, so that no whole update is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ftlib.core import files, log
from ftlib.errors import UserError
from ftlib.merging.architecture import check_adapter_complete, transposed_weights
from ftlib.merging.checkpoint_io import (
    canonical_name,
    canonical_names,
    is_vocabulary_sized,
    model_part_of,
    open_weights,
    tensors_equal,
)
from ftlib.models.tensor_files import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA affects only some tokens",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "replicated layers are not in the base",
    "lora_bias": "lora_bias adds biases that the base lacks",
    "monteclora_config": "MonteCLoRA draws its factors",
    "target_parameters": "target_parameters adapts parameters that are not layer weights",
    "trainable_token_indices": "trainable_token_indices changes single rows of the embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA pools its inputs",
    "velora_config": "VeLoRA",
}
"""Settings of PEFT's LoraConfig with which an update is not scale·B·A → reason."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights, so that the adapter does not fit the original base."""

_HALF = {"relative": 2**-8, "absolute": 2**-24}
"""Relative rounding error of bfloat16 and float16."""


class FinetunedModel(Protocol):
    """A fine-tuned model relative to its base."""

    def changes(self, name: str) -> bool:
        """Return whether a weight (canonical name) may differ from the base's."""

    def whole(self, name: str) -> StoredTensor | None:
        """Return the stored weight; None if only an update, or nothing, is stored."""

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        """Return the float32 rows from `start` on, given the same rows of the base; both have shape (rows, columns)."""

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        """Return `value` minus `base`."""


def canonical_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return canonical name → tensor of a folder.

    Raises:
        UserError: two stored names have the same canonical name.
    """
    found: dict[str, StoredTensor] = {}
    stored = open_weights(folder)
    for name, key in canonical_names(stored).items():
        if key in found:
            raise UserError(f"{folder}: two weights have the canonical name {key}, one of them {name}")
        found[key] = stored[name]
    return found


@dataclass(frozen=True)
class FullCheckpoint:
    """A model with all weights stored."""

    tensors: dict[str, StoredTensor]

    def changes(self, name: str) -> bool:
        return True

    def whole(self, name: str) -> StoredTensor | None:
        return self.tensors[name]

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        return self.tensors[name].read(start, start + len(base)).float()

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        return self.value(name, start, base).sub_(base)


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = scale · left @ right.

    Attributes:
        left: float32 (rows of W, r).
        right: float32 (r, columns of W).
        magnitude: with DoRA, the length of every row (of a transposed W: of every column).
        embedding: whether it adapts embeddings.
        transposed: whether the stored factors give the transposed ΔW.
        column_factors: with DoRA and a transposed W, the factor of every column of W + ΔW.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None
    embedding: bool = False
    transposed: bool = False
    column_factors: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Return whether the update is zero; DoRA magnitudes count as a change."""
        return self.magnitude is None and not (self.scale and self.left.any() and self.right.any())

    def with_column_factors(self, base: StoredTensor) -> LowRankUpdate:
        """Return a copy with `column_factors`, which need a pass over the base's weight."""
        assert self.magnitude is not None
        squares, step = torch.zeros(base.columns), max(1, (1 << 20) // max(1, base.columns))
        for start in range(0, base.rows, step):
            rows = base.read(start, min(start + step, base.rows)).float()
            squares += (rows + self._product(start, len(rows))).square_().sum(dim=0)
        return replace(self, column_factors=self.magnitude / squares.sqrt())

    def update(self, start: int, base: Tensor) -> Tensor:
        """Return its rows from `start` on."""
        product = self._product(start, len(base))
        if self.magnitude is None:
            return product
        turned = base + product
        if self.column_factors is not None:
            return turned.mul_(self.column_factors).sub_(base)
        length = torch.linalg.vector_norm(turned, dim=1, keepdim=True)
        return turned.mul_(self.magnitude[start : start + len(base), None] / length).sub_(base)

    def _product(self, start: int, count: int) -> Tensor:
        product: Tensor = (self.left[start : start + count] @ self.right).mul_(self.scale)
        return product


@dataclass(frozen=True)
class LoraAdapter:
    """A PEFT LoRA adapter.

    Attributes:
        low_rank: canonical name of a weight → its update.
        full_tensors: weights that are stored whole (modules_to_save, biases).
        names: canonical name of a weight → name of its module in the adapter's files.
        tied: whether it changes tied embeddings and head together (ensure_weight_tying).
    """

    low_rank: dict[str, LowRankUpdate]
    full_tensors: dict[str, StoredTensor]
    names: dict[str, str]
    config: dict[str, Any]
    tied: bool

    def changes(self, name: str) -> bool:
        return name in self.low_rank or name in self.full_tensors

    def whole(self, name: str) -> StoredTensor | None:
        return self.full_tensors.get(name)

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        if name in self.full_tensors:
            return self.full_tensors[name].read(start, start + len(base)).float()
        return base + self.low_rank[name].update(start, base) if name in self.low_rank else base.clone()

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        if name in self.low_rank:
            return self.low_rank[name].update(start, base)
        return self.value(name, start, base).sub_(base)


def open_adapter(folder: Path, base: dict[str, StoredTensor], skeleton: PreTrainedModel | None = None) -> LoraAdapter:
    """Read a LoRA adapter; its factors are kept in memory.

    Args:
        base: the base's weights by canonical name.
        skeleton: the base on the meta device, if it can be built: shows which factors are transposed and which layers
            the adapter must have.

    Raises:
        UserError: another type of adapter, or several; keys that do not match the base; copies of another base's
            weights; missing layers; an adapter that changes nothing.
    """
    config = files.read_json(folder / "adapter_config.json")
    _reject_unsupported(folder, config)
    factors: dict[str, dict[str, StoredTensor]] = {}
    names: dict[str, str] = {}
    replaced = {}
    tied = False
    for stored_name, tensor in open_weights(folder).items():
        module, kind = _split(stored_name)
        key = canonical_name(f"{module}.weight" if kind else stored_name)
        if kind:
            names[key] = module.removeprefix("base_model.model.")
        if config.get("ensure_weight_tying") and model_part_of(key) == "head" and key not in base:
            tied = True
            continue  # a copy of the embeddings' update
        _check_key(folder, stored_name, key, base, None if kind else tensor.shape)
        if key in replaced if not kind else kind in factors.get(key, {}):
            raise UserError(
                f"{folder}: {key} has two updates, the second in {stored_name}: the file contains two adapters",
                "Save each of them separately: model.save_pretrained(FOLDER, selected_adapters=[NAME]).",
            )
        if kind:
            factors.setdefault(key, {})[kind] = tensor
        else:
            replaced[key] = tensor
    for key in factors.keys() & replaced.keys():
        _check_copy(folder, key, replaced.pop(key), base[key])
    if tied:
        _check_scales(folder, names, config)
    transposed = transposed_weights(skeleton)
    low_rank = {
        key: _low_rank(folder, names[key], group, base[key], config, None if transposed is None else key in transposed)
        for key, group in factors.items()
    }
    adapter = LoraAdapter(low_rank, replaced, names, config, tied)
    _check_changes(folder, adapter, base)
    if skeleton is not None:
        check_adapter_complete(skeleton, folder, low_rank.keys(), replaced.keys(), base.keys())
    for name in config.get("modules_to_save") or ():
        if not any(name in key.split(".") for key in replaced) and not tied:
            raise UserError(f"{folder}: the weights of {name} are missing, but modules_to_save lists it")
    return adapter


def _check_changes(folder: Path, adapter: LoraAdapter, base: Mapping[str, StoredTensor]) -> None:
    """Reject an adapter that changes nothing, and report layers that it does not change.

    Raises:
        UserError: it changes nothing.
    """
    remedy = "Was it saved before training, or with DeepSpeed ZeRO-3 without gathering its weights?"
    idle = [key for key, update in adapter.low_rank.items() if update.is_zero]
    if len(idle) < len(adapter.low_rank):
        if idle:
            log.warning(f"{folder}: {len(idle)} of its {len(adapter.low_rank)} layers change nothing (lora_B is zero)")
        return
    if any(not tensors_equal(tensor, base[key]) for key, tensor in adapter.full_tensors.items()):
        return
    if not adapter.low_rank and not adapter.full_tensors:
        raise UserError(f"{folder}: the adapter is empty", remedy)
    if adapter.config.get("lora_alpha") == 0:
        raise UserError(f"{folder}: lora_alpha is 0, so the adapter changes nothing", "Set it as in training.")
    raise UserError(f"{folder}: the adapter changes nothing: lora_B is zero in all of its layers", remedy)


def _reject_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: an adapter of type {config.get('peft_type')}; only LoRA adapters are supported")
    for field, reason in _UNSUPPORTED.items():
        if config.get(field):
            raise UserError(f"{folder}: this adapter cannot be merged: {reason} ({field})")
    how = str(config.get("init_lora_weights")).lower()
    if how.startswith(_CHANGES_BASE):
        problem = f"{folder}: init_lora_weights: {how} changed the weights of its base"
        raise UserError(problem, "Convert it to plain LoRA first: peft's save_pretrained(path_initial_model_for_…).")


def _split(name: str) -> tuple[str, str]:
    """Return (module, kind of factor) of a stored name; the kind is "" for a whole weight."""
    words = name.split(".")
    for kind in _FACTORS:
        if kind in words:
            return ".".join(words[: words.index(kind)]), kind
    return name, ""


def _check_key(
    folder: Path, stored: str, key: str, base: dict[str, StoredTensor], shape: tuple[int, ...] | None
) -> None:
    if key not in base:
        hint = "The base ties head and embeddings." if model_part_of(key) == "head" else "Is it of another model?"
        raise UserError(f"{folder}: {stored} does not match the base, which has no {key}", hint)
    added = is_vocabulary_sized(key) and shape and shape[0] > base[key].rows and shape[1:] == base[key].shape[1:]
    if shape is not None and shape != base[key].shape and not added:
        raise UserError(f"{folder}: {stored} has shape {list(shape)}, the base's has {list(base[key].shape)}")


def _check_copy(folder: Path, key: str, copy: StoredTensor, base: StoredTensor) -> None:
    """Compare the copies of embeddings and heads, which PEFT saves beside their factors, with the base."""
    if not tensors_equal(copy, base, **_HALF):
        problem = f"{folder}: its copy of {key} differs from the base"
        raise UserError(problem, "Is it of another model?")


def _check_scales(folder: Path, names: dict[str, str], config: dict[str, Any]) -> None:
    """Check that tied embeddings and head, which share factors, have the same scale in `alpha_pattern`."""
    modules = [module for key, module in names.items() if model_part_of(key) in ("embeddings", "head")]
    if len({_scale(config, module, 1) for module in modules}) > 1:
        raise UserError(f"{folder}: alpha_pattern differs for embeddings and head, which are tied in the base")


def _low_rank(
    folder: Path,
    module: str,
    group: dict[str, StoredTensor],
    base: StoredTensor,
    config: dict[str, Any],
    transposed: bool | None,
) -> LowRankUpdate:
    """Return the update of one layer.

    Args:
        transposed: whether the base's layer is stored transposed; None: use fan_in_fan_out.
    """
    embedding = "lora_embedding_A" in group
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [kind for kind in kinds if kind not in group]:
        raise UserError(f"{folder}: {module} lacks its {missing[0]}")
    if len(base.shape) != 2:
        raise UserError(f"{folder}: {module} is not a linear layer; only adapters of linear layers are supported")
    a, b = (group[kind].read().float() for kind in kinds)
    if transposed is None:
        transposed = bool(config.get("fan_in_fan_out")) and (a.shape[1], b.shape[0]) == base.shape
    flipped = embedding or transposed
    left, right = (a.T.contiguous(), b.T.contiguous()) if flipped else (b, a)
    if (len(left), right.shape[1]) != base.shape or left.shape[1] != len(right):
        raise UserError(
            f"{folder}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)} do not match the base's "
            f"{list(base.shape)}"
        )
    magnitude = group.get("lora_magnitude_vector")
    if magnitude and embedding:
        raise UserError(f"{folder}: {module}: DoRA on embeddings cannot be merged")
    lengths = magnitude.read().float().flatten() if magnitude else None
    update = LowRankUpdate(left, right, _scale(config, module, len(a)), lengths, embedding, flipped)
    return update.with_column_factors(base) if flipped and magnitude else update


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    usual = config.get("lora_alpha", LoraConfig.lora_alpha)
    alpha = patterns.get(get_pattern_key(list(patterns), module), usual)
    if type(alpha) not in (int, float):
        raise UserError(f"adapter_config.json: lora_alpha of {module} must be a number, got {alpha!r:.60}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
