"""What transformers and PEFT make of a base: its weights, its layers, and which of them an adapter adapts.

The base is built on torch's meta device from its config and the shapes in its files, so nothing is read or computed.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftlib.core import log
from ftlib.errors import UserError
from ftlib.merging.checkpoint_io import canonical_name, is_buffer, model_part_of
from ftlib.models.libraries import quiet_libraries
from ftlib.models.tensor_files import StoredTensor

if TYPE_CHECKING:  # saves memory in merges of plain weight files
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PreTrainedConfig | None:
    """Return a model's config; None without one, or if transformers does not know the architecture."""
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    quiet_libraries()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # a config class may raise anything for unexpected values
        return None
    return config


def is_tied(config: PreTrainedConfig | None) -> bool:
    """Whether head and embeddings are one matrix; False without a config."""
    return bool(getattr(config, "tie_word_embeddings", False))


def build_skeleton(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor], label: str) -> PreTrainedModel | None:
    """Return the base as transformers would load it from these tensors, on the meta device; None if that is impossible.

    Args:
        tensors: by their stored names.

    Raises:
        UserError: a weight of the architecture is missing, or has another shape.
    """
    import transformers

    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        what = names[0] if names else f"model_type {config.model_type} without `architectures`"
        log.warning(f"{label}: cannot check that all of its weights are present: transformers has no {what}")
        return None
    meta = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
        if not is_buffer(canonical_name(name))
    }
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=meta,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers cannot build every model on the meta device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(f"{label}: cannot check that all of its weights are present: {reason}")
        return None
    _require_weights(info, label)
    found: PreTrainedModel = model
    return found


def _require_weights(info: Mapping[str, Any], label: str) -> None:
    odd = {str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info.get("mismatched_keys") or ()}
    missing = sorted(set(map(str, info.get("missing_keys") or ())) - odd)
    for found, problem in ((missing, "weights of its architecture are missing"), (sorted(odd), "weights do not fit")):
        if found:
            shown = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"{label}: {len(found)} {problem}: {shown}",
                "A file may be missing, or config.json may be another model's. Download the model again.",
            )
    if extra := sorted(map(str, info.get("unexpected_keys") or ())):
        shown = ", ".join(extra[:3]) + (" …" if len(extra) > 3 else "")
        log.warning(f"{label}: {len(extra)} weights that its architecture does not have: {shown}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings, report and progress bar of loading."""
    from transformers.utils import logging as transformers_logging

    logger, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def transposed_weights(skeleton: PreTrainedModel | None) -> frozenset[str] | None:
    """Return canonical names of the weights that are stored transposed, as in GPT-2; None if unknown."""
    if skeleton is None:
        return None
    from transformers.pytorch_utils import Conv1D

    found = (name for name, module in skeleton.named_modules() if isinstance(module, Conv1D))
    return frozenset(canonical_name(f"{name}.weight") for name in found)


def adapted_weights(skeleton: PreTrainedModel, adapter: Path) -> set[str]:
    """Return canonical names of the weights that PEFT would adapt according to the adapter's config.

    Raises:
        UserError: PEFT cannot apply the config to this base, for example because it lacks the target_modules.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = LoraConfig.from_pretrained(adapter)
    settings.inference_mode = True
    try:
        with _quiet():
            adapted = inject_adapter_in_model(settings, copy.deepcopy(skeleton), low_cpu_mem_usage=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{adapter}: PEFT cannot apply it to this base: {reason}", "Is it of another model?") from None
    layers = (name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer))
    return {canonical_name(f"{name}.weight") for name in layers}


def check_adapter_complete(
    skeleton: PreTrainedModel, adapter: Path, updated: Set[str], saved: Set[str], base: Set[str]
) -> None:
    """Check that an adapter has all layers of its target_modules, and no others.

    A part of the model (such as the vision tower) without any adapted layer is only reported: some programs adapt the
    language model with names that also match the vision tower.

    Args:
        updated: canonical names of the weights with a low-rank update.
        saved: canonical names of the weights that it stores whole.
        base: canonical names of all weights.

    Raises:
        UserError: layers are missing, or PEFT would ignore some.
    """
    adapted, present = adapted_weights(skeleton, adapter) & base, updated | saved
    if ignored := sorted(updated - adapted):
        shown = ", ".join(ignored[:3]) + (" …" if len(ignored) > 3 else "")
        raise UserError(
            f"{adapter}: {len(ignored)} layers of its file are not among those that its config adapts: {shown}",
            "PEFT ignores them. Correct target_modules (or layers_to_transform and the like) in adapter_config.json.",
        )
    missing = adapted - present
    parts = {model_part_of(name) for name in present}
    lost = sorted(name for name in missing if model_part_of(name) in parts)
    if lost:
        shown = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        raise UserError(
            f"{adapter}: {len(lost)} layers of its target_modules are missing in its file: {shown}",
            "The file is incomplete; save the adapter again. If this is intended, list its layers in target_modules.",
        )
    if missing:
        shown = ", ".join(sorted({model_part_of(name) for name in missing}))
        log.warning(
            f"{adapter}: its target_modules match {len(missing)} layers of {shown}, but its file has none of them"
        )
