"""Load weights strictly: a key that is missing or left over is an error, never a silent random layer."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ftlib.errors import UserError
from ftlib.hub import require_model
from ftlib.models import attention as attending
from ftlib.models.causal import check_model
from ftlib.models.families import FAMILIES


def load_weights(
    folder: Path,
    dtype: str,
    family: str = "paligemma",
    *,
    attention: attending.Attention = "auto",
    final_softcap: attending.FinalSoftcap = "auto",
) -> PreTrainedModel:
    """Load a checkpoint of any key naming that transformers has used.

    `from_pretrained` maps old names to new ones; that every weight found its place is checked here.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        attention, final_softcap: see `config.Model` and `attention.py`.

    Raises:
        UserError: no model there, damaged files, pickles of more than tensors, keys that do not fit, or an attention
            that does not fit the model.
    """
    require_model(folder)
    try:
        config = _config(folder, family, final_softcap)
        model, info = FAMILIES[family].model_class.from_pretrained(
            folder,
            config=config,
            attn_implementation=attending.choose_implementation(config, attention),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    except UnpicklingError:
        problem = f"{folder}: the weights hold more than tensors; loading them could run somebody's code"
        raise UserError(problem, "Take a model with safetensors.") from None
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: the model cannot be loaded: {str(error).splitlines()[0]}") from None
    _raise_wrong_keys(folder, info)
    check_model(model, str(folder))
    attending.apply_final_softcap(model)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put a PEFT adapter on its base model.

    Raises:
        UserError: no adapter there, or its keys do not fit the model.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter in it (adapter_config.json is missing)")
    config = LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = None
    adapted = get_peft_model(model, config)
    weights = load_file(folder / "adapter_model.safetensors")
    expected = set(get_peft_model_state_dict(adapted))
    _raise_wrong_keys(folder, {"missing_keys": expected - set(weights), "unexpected_keys": set(weights) - expected})
    set_peft_model_state_dict(adapted, weights)
    return adapted


def _config(folder: Path, family: str, final_softcap: attending.FinalSoftcap) -> PreTrainedConfig:
    """The model's own config, with what its family does otherwise."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not FAMILIES[family].local_attention:
        attending.attend_everywhere(config)
    attending.settle_final_softcap(config, final_softcap, usual=FAMILIES[family].final_softcap)
    return config


def _raise_wrong_keys(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
            word = kind.removesuffix("_keys")
            raise UserError(f"{folder}: {len(keys)} {word} weights: {shown}", "The files do not belong to this model.")
