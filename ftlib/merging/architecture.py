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
from ftlib.merging.checkpoint_io import StoredTensor, canonical_name, is_buffer, model_part_of
from ftlib.models.libraries import quiet_libraries

if TYPE_CHECKING:  # transformers takes memory that a merge of bare weights does not need
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PreTrainedConfig | None:
    """A model's config; None without one, or if transformers itself does not know the architecture."""
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    quiet_libraries()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever a config class raises on values that it does not expect
        return None
    return config


def is_tied(config: PreTrainedConfig | None) -> bool:
    """Whether head and embeddings are one matrix; False without a config."""
    return bool(getattr(config, "tie_word_embeddings", False))


def build_skeleton(config: PreTrainedConfig, tensors: Mapping[str, StoredTensor], label: str) -> PreTrainedModel | None:
    """The base as transformers would load it from these tensors, on the meta device; None if it cannot be told.

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
        log.warning(f"{label}: whether all of its weights are there cannot be checked: transformers has no {what}")
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
        log.warning(f"{label}: whether all of its weights are there cannot be checked: {reason}")
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
                "Is a file of the model missing, or its config.json another model's? Download the model again.",
            )
    if extra := sorted(map(str, info.get("unexpected_keys") or ())):
        shown = ", ".join(extra[:3]) + (" …" if len(extra) > 3 else "")
        log.warning(f"{label}: {len(extra)} weights that its architecture does not have: {shown}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, table and progress bar of a loading that reads nothing."""
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
    """Canonical names of the weights that are stored transposed, as GPT-2's; None if that is not known."""
    if skeleton is None:
        return None
    from transformers.pytorch_utils import Conv1D

    found = (name for name, module in skeleton.named_modules() if isinstance(module, Conv1D))
    return frozenset(canonical_name(f"{name}.weight") for name in found)


def adapted_weights(skeleton: PreTrainedModel, adapter: Path) -> set[str]:
    """Canonical names of the weights that PEFT would adapt on the base by the adapter's own config.

    Raises:
        UserError: PEFT cannot apply the config to this base, for example since its target_modules are not in it.
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


def check_adapter_complete(skeleton: PreTrainedModel, adapter: Path, present: Set[str], base: Set[str]) -> None:
    """Refuse an adapter that lacks layers which its own target_modules name.

    A part of the model (such as the vision tower) in which it has no layer at all is reported only: some programs adapt
    the language model by names that the vision tower has, too.

    Args:
        present: canonical names of the weights that it changes; `base`: of all weights.

    Raises:
        UserError: layers are missing.
    """
    missing = (adapted_weights(skeleton, adapter) & base) - present
    parts = {model_part_of(name) for name in present}
    lost = sorted(name for name in missing if model_part_of(name) in parts)
    if lost:
        shown = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        raise UserError(
            f"{adapter}: {len(lost)} layers that its target_modules name are not in its file: {shown}",
            "The file is incomplete; save the adapter again. If it is meant so, name its layers in target_modules.",
        )
    if missing:
        shown = ", ".join(sorted({model_part_of(name) for name in missing}))
        log.warning(
            f"{adapter}: its target_modules name {len(missing)} layers of {shown}, and its file changes none there"
        )
