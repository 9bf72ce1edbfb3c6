"""Load weights strictly: a key that is missing or left over is an error, never a silent random layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ftlib.errors import UserError
from ftlib.hub import require_model
from ftlib.models.causal import check_model
from ftlib.models.families import FAMILIES

NEVER_QUANTIZED = [".*vision_tower", ".*multi_modal_projector", "lm_head", "embed_out"]
"""What is no linear layer of a language model; SigLIP and the (tied) head lose too much. Regular expressions."""


def load_weights(
    folder: Path, dtype: str, family: str = "paligemma", quantization: Literal["none", "int8", "nf4"] = "none"
) -> PreTrainedModel:
    """Load a checkpoint of any key naming that transformers has used.

    `from_pretrained` maps old names to new ones; that every weight found its place is checked here.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        quantization: of the language model's linear layers; then the model comes to lie on this process's device.

    Raises:
        UserError: no model there, damaged files, keys that do not fit, or no bitsandbytes to quantize with.
    """
    require_model(folder)
    try:
        model, info = FAMILIES[family].model_class.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
            **({} if quantization == "none" else _quantized(dtype, quantization)),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: the model cannot be loaded: {str(error).splitlines()[0]}") from None
    _raise_wrong_keys(folder, info)
    check_model(model, str(folder))
    return model


def device() -> torch.device:
    """Where this process computes: the GPU that it was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _quantized(dtype: str, quantization: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: {quantization} needs bitsandbytes", "pip install 'ftlib[quant]'")
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, dtype),
    }
    settings = BitsAndBytesConfig(
        llm_int8_skip_modules=NEVER_QUANTIZED, **(nf4 if quantization == "nf4" else {"load_in_8bit": True})
    )
    return {"quantization_config": settings, "device_map": {"": device()}}


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


def _raise_wrong_keys(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
            word = kind.removesuffix("_keys")
            raise UserError(f"{folder}: {len(keys)} {word} weights: {shown}", "The files do not belong to this model.")
