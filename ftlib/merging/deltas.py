"""What a fine-tuned model changed of its base: full checkpoints and PEFT adapters behind one interface.

An adapter's update of a layer is ΔW = scale·B·A in float32 (Hu et al. 2021, arXiv:2106.09685), with scale α/r or
α/√r (rsLoRA, arXiv:2312.03732); DoRA (arXiv:2402.09353) turns W + ΔW to rows of its own length. Factors are multiplied
row block by row block, so that no update is ever held whole.
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
    StoredTensor,
    canonical_name,
    is_vocabulary_sized,
    model_part_of,
    open_weights,
    tensors_equal,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


class FinetunedModel(Protocol):
    """A fine-tuned model, seen from its base."""

    def changes(self, name: str) -> bool:
        """Whether a weight (canonical name) may differ from the base's."""

    def whole(self, name: str) -> StoredTensor | None:
        """The weight as the model stores it; None if it stores only a change, or none."""

    def value(self, name: str, start: int, base: Tensor) -> Tensor:
        """Its float32 rows from `start` on, for the base's rows there; both of shape (rows, columns)."""

    def update(self, name: str, start: int, base: Tensor) -> Tensor:
        """`value` minus `base`."""


def canonical_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its canonical name.

    Raises:
        UserError: two stored names mean the same weight.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in open_weights(folder).items():
        key = canonical_name(name)
        if key in found:
            raise UserError(f"{folder}: two of its weights are called {key}, one of them {name}")
        found[key] = tensor
    return found


@dataclass(frozen=True)
class FullCheckpoint:
    """All weights of a model."""

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
        magnitude: DoRA: the length of every row, of a transposed W of every column.
        embedding: whether it adapts embeddings; `transposed`: whether the stored factors give ΔW transposed.
        column_factors: DoRA of a transposed W: what every column of W + ΔW is multiplied by.
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
        """Whether it changes nothing; DoRA's magnitudes count as a change."""
        return self.magnitude is None and not (self.scale and self.left.any() and self.right.any())

    def with_column_factors(self, base: StoredTensor) -> LowRankUpdate:
        """Itself with `column_factors`, which need a pass over the base's weight."""
        assert self.magnitude is not None
        squares, step = torch.zeros(base.columns), max(1, (1 << 20) // max(1, base.columns))
        for start in range(0, base.rows, step):
            rows = base.read(start, min(start + step, base.rows)).float()
            squares += (rows + self._product(start, len(rows))).square_().sum(dim=0)
        return replace(self, column_factors=self.magnitude / squares.sqrt())

    def update(self, start: int, base: Tensor) -> Tensor:
        """Its rows from `start` on."""
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
        full_tensors: weights that it brings whole (modules_to_save, biases).
        names: canonical name of a weight → its module's name in the adapter's files.
        tied: whether it changes embeddings and head alike, which are one matrix in the base (ensure_weight_tying).
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
    """Read a LoRA adapter; its factors are held in memory.

    Args:
        base: the base's weights by canonical name.
        skeleton: the base on the meta device, where that can be built: its layers tell which factors are transposed
            and which layers the adapter must have.

    Raises:
        UserError: another kind of adapter, or several; keys that do not fit the base; copies of another base's weights;
            layers that are missing; an adapter that changes nothing.
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
            continue  # the embeddings' own once more
        _check_key(folder, stored_name, key, base, None if kind else tensor.shape)
        if key in replaced if not kind else kind in factors.get(key, {}):
            raise UserError(
                f"{folder}: {key} is changed twice, the second time by {stored_name}: two adapters are in one file",
                "Save each of them by itself: model.save_pretrained(FOLDER, selected_adapters=[NAME]).",
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
        check_adapter_complete(skeleton, folder, low_rank.keys() | replaced.keys(), base.keys())
    for name in config.get("modules_to_save") or ():
        if not any(name in key.split(".") for key in replaced) and not tied:
            raise UserError(f"{folder}: it lacks the weights of {name}, which its modules_to_save names")
    return adapter


def _check_changes(folder: Path, adapter: LoraAdapter, base: Mapping[str, StoredTensor]) -> None:
    """Refuse an adapter that leaves the base as it is, and report layers that it does.

    Raises:
        UserError: it changes nothing.
    """
    remedy = "Was it saved before it was trained, or under DeepSpeed ZeRO-3 without gathering its weights?"
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
        raise UserError(f"{folder}: lora_alpha is 0, so the adapter changes nothing", "Set it as it was in training.")
    raise UserError(f"{folder}: the adapter changes nothing: lora_B is zero in all of its layers", remedy)


def _reject_unsupported(folder: Path, config: dict[str, Any]) -> None:
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


def _check_key(
    folder: Path, stored: str, key: str, base: dict[str, StoredTensor], shape: tuple[int, ...] | None
) -> None:
    if key not in base:
        hint = "The base's head is its embeddings." if model_part_of(key) == "head" else "Is it of another model?"
        raise UserError(f"{folder}: {stored} has no place in the base: there is no {key}", hint)
    added = is_vocabulary_sized(key) and shape and shape[0] > base[key].rows and shape[1:] == base[key].shape[1:]
    if shape is not None and shape != base[key].shape and not added:
        raise UserError(f"{folder}: {stored} has shape {list(shape)}, the base's has {list(base[key].shape)}")


def _check_copy(folder: Path, key: str, copy: StoredTensor, base: StoredTensor) -> None:
    """Beside the factors of embeddings and heads PEFT saves the weights that they adapt, in the type of training."""
    if not tensors_equal(copy, base, **_HALF):
        problem = f"{folder}: beside its update of {key} it holds the weights that it was trained on, not the base's"
        raise UserError(problem, "Is it of another model?")


def _check_scales(folder: Path, names: dict[str, str], config: dict[str, Any]) -> None:
    """Heads share the factors of embeddings that they are tied to, but not their place in `alpha_pattern`."""
    modules = [module for key, module in names.items() if model_part_of(key) in ("embeddings", "head")]
    if len({_scale(config, module, 1) for module in modules}) > 1:
        raise UserError(f"{folder}: alpha_pattern sets apart embeddings and head, which are one matrix in the base")


def _low_rank(
    folder: Path,
    module: str,
    group: dict[str, StoredTensor],
    base: StoredTensor,
    config: dict[str, Any],
    transposed: bool | None,
) -> LowRankUpdate:
    """The update of one layer.

    Args:
        transposed: whether the base's layer is stored transposed; None if only fan_in_fan_out tells.
    """
    embedding = "lora_embedding_A" in group
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [kind for kind in kinds if kind not in group]:
        raise UserError(f"{folder}: {module} lacks its {missing[0]}")
    if len(base.shape) != 2:
        raise UserError(f"{folder}: {module} is a convolution or the like; only adapters of linear layers are merged")
    a, b = (group[kind].read().float() for kind in kinds)
    if transposed is None:
        transposed = bool(config.get("fan_in_fan_out")) and (a.shape[1], b.shape[0]) == base.shape
    flipped = embedding or transposed
    left, right = (a.T.contiguous(), b.T.contiguous()) if flipped else (b, a)
    if (len(left), right.shape[1]) != base.shape or left.shape[1] != len(right):
        raise UserError(
            f"{folder}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)} do not fit the base's "
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
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
