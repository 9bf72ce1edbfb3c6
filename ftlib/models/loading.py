"""Load weights strictly: a key that is missing or left over is an error, never a silent random layer."""

from __future__ import annotations

import importlib.util
import os
import traceback
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ftlib import console
from ftlib.config import Model
from ftlib.errors import UserError
from ftlib.gpu_architectures import require_kernels
from ftlib.hub import require_model
from ftlib.models import attention as attending
from ftlib.models.causal import check_model
from ftlib.models.families import FAMILIES
from ftlib.out_of_memory import enough_memory, is_out_of_memory

NEVER_QUANTIZED = [".*vision_tower", ".*multi_modal_projector", "lm_head", "embed_out"]
"""What is no linear layer of a language model; SigLIP and the (tied) head lose too much. Regular expressions."""


_SCALES = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
"""What an adapter's weights mean without saying so: ftlib's word → peft's."""


def load_model(folder: Path, settings: Model) -> PreTrainedModel:
    """Load a checkpoint as a config asks; see `load_weights`."""
    return load_weights(
        folder,
        settings.dtype,
        settings.family,
        settings.quantization,
        attention=settings.attention,
        final_softcap=settings.final_softcap,
    )


def load_weights(
    folder: Path,
    dtype: str,
    family: str = "paligemma",
    quantization: Literal["none", "int8", "nf4"] = "none",
    *,
    attention: attending.Attention = "auto",
    final_softcap: attending.FinalSoftcap = "auto",
) -> PreTrainedModel:
    """Load a checkpoint of any key naming that transformers has used.

    `from_pretrained` maps old names to new ones; that every weight found its place is checked here.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        quantization: of the language model's linear layers; then the model comes to lie on this process's device.
        attention, final_softcap: see `config.Model` and `attention.py`.

    Raises:
        UserError: no model there, damaged files, pickles of more than tensors, keys that do not fit, an attention that
            does not fit the model, no bitsandbytes to quantize with, a GPU that this build of torch has no kernels for,
            or out of memory.
    """
    with enough_memory():
        return _load_weights(folder, dtype, family, quantization, attention, final_softcap)


def _load_weights(
    folder: Path,
    dtype: str,
    family: str,
    quantization: Literal["none", "int8", "nf4"],
    attention: attending.Attention,
    final_softcap: attending.FinalSoftcap,
) -> PreTrainedModel:
    require_model(folder)
    require_kernels(torch, device().index)
    try:
        config = _config(folder, family, final_softcap)
        model, info = FAMILIES[family].model_class.from_pretrained(
            folder,
            config=config,
            attn_implementation=attending.choose_implementation(config, attention),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
            **({} if quantization == "none" else _quantized(dtype, quantization)),
        )
    except UnpicklingError:
        problem = f"{folder}: the weights hold more than tensors; loading them could run somebody's code"
        raise UserError(problem, "Take a model with safetensors.") from None
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        lost = _lost_words(error)
        if is_out_of_memory(RuntimeError(lost)):
            raise RuntimeError(lost) from None
        problem = f"{folder}: the model cannot be loaded: {str(error).splitlines()[0]}"
        raise UserError(f"{problem}: {lost.splitlines()[0]}" if lost else problem) from None
    _raise_wrong_keys(folder, info)
    check_model(model, str(folder))
    attending.apply_final_softcap(model)
    if quantization != "none":
        _compute_alike_on_every_cpu(model)
        layers = sum(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules())
        console.say(f"{quantization}: {layers} linear layers of the language model; everything else is {dtype}")
    return model


def _lost_words(error: Exception) -> str:
    """What went wrong while transformers quantized weights: it collects such errors and raises one without their words.

    Each is kept as a traceback, the error's own words and what was at work; "" if nothing was collected.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        collected = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if collected:
            lines = next(iter(collected.values())).splitlines()
            return "\n".join(line for line in lines if line and not line.startswith((" ", "Traceback", "Error")))
    return ""


def device() -> torch.device:
    """Where this process computes: the CPU, or its own GPU of those that its Slurm task sees."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("SLURM_LOCALID", 0)) % torch.cuda.device_count())


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


def _compute_alike_on_every_cpu(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are stored.

    On CPUs with AVX512-BF16, bitsandbytes repacks them in place when a layer is first used in evaluation mode: layers
    of other shapes than its kernel's then fail, scales are rounded to bfloat16, and no gradient passes from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put a PEFT adapter on its base model.

    Raises:
        UserError: no adapter there, or its keys do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter in it (adapter_config.json is missing)")
    config = LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = None
    adapted = get_peft_model(model, config)
    fill_adapter(adapted, folder)
    return adapted


def fill_adapter(adapted: torch.nn.Module, folder: Path) -> None:
    """Put a saved adapter's weights into a model that has an adapter of the same shape.

    Raises:
        UserError: their keys, shapes or scales differ, or the file is damaged.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    theirs, ours = LoraConfig.from_pretrained(folder), adapted.peft_config["default"]  # type: ignore[index]
    for name, field in _SCALES.items():
        if getattr(theirs, field) != getattr(ours, field):
            raise UserError(f"{folder}: {name} is {getattr(theirs, field)} there, {getattr(ours, field)} here")
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: the adapter cannot be loaded: {str(error).splitlines()[0]}") from None
    expected = get_peft_model_state_dict(adapted)
    odd = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    keys = {"missing_keys": set(expected) - set(weights), "unexpected_keys": set(weights) - set(expected)}
    _raise_wrong_keys(folder, {**keys, "mismatched_keys": odd})
    set_peft_model_state_dict(adapted, weights)


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
