"""Load weights strictly: a key that is missing or left over is an error, never a silent random layer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import traceback
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ftlib.config.schema import Model
from ftlib.core import log
from ftlib.core.gpu import require_kernels
from ftlib.core.out_of_memory import is_out_of_memory, oom_as_user_error
from ftlib.core.safetensors_header import read_safetensors_header
from ftlib.errors import UserError
from ftlib.hub.cache import require_model
from ftlib.hub.offline import offline
from ftlib.models import attention as models_attention
from ftlib.models import sharded_loading
from ftlib.models.causal_lm import validate_model
from ftlib.models.custom_code import load_error_message
from ftlib.models.libraries import quiet_libraries
from ftlib.models.registry import ModelFamily, family_of, model_family

_SCALES = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
"""What an adapter's weights mean without saying so: ftlib's word → peft's."""


def load_model(folder: Path, settings: Model, mesh: DeviceMesh | None = None) -> PreTrainedModel:
    """Load a checkpoint as a config asks; see `load_weights`."""
    return load_weights(
        folder,
        settings.dtype,
        family_of(settings),
        settings.quantization,
        attention=settings.attention,
        final_softcap=settings.final_softcap,
        mesh=mesh,
    )


@offline()
def load_weights(
    folder: Path,
    dtype: str,
    family: str | ModelFamily = "paligemma",
    quantization: Literal["none", "int8", "nf4"] = "none",
    *,
    attention: models_attention.AttentionChoice = "auto",
    final_softcap: models_attention.FinalSoftcapChoice = "auto",
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """Load a checkpoint of any key naming that transformers has used.

    `from_pretrained` maps old names to new ones; that every weight found its place is checked here.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        quantization: of the language model's linear layers; then the model comes to lie on this process's device.
        attention, final_softcap: see `config.Model` and `attention.py`.
        mesh: the ranks that share the model, each of which reads its part (`sharded_loading.py`); all must call this.

    Raises:
        UserError: no model there, damaged files, pickles of more than tensors, keys that do not fit, an attention that
            does not fit the model, no bitsandbytes to quantize with, a GPU that this build of torch has no kernels for,
            or out of memory.
    """
    kind = model_family(family) if isinstance(family, str) else family
    parts = sharded_loading.reading_own_part(mesh, device()) if mesh else contextlib.nullcontext()
    together = sharded_loading.failing_together() if mesh else contextlib.nullcontext()
    with together, oom_as_user_error(), parts:
        return _load_weights(folder, dtype, kind, quantization, attention, final_softcap)


def _load_weights(
    folder: Path,
    dtype: str,
    family: ModelFamily,
    quantization: Literal["none", "int8", "nf4"],
    attention: models_attention.AttentionChoice,
    final_softcap: models_attention.FinalSoftcapChoice,
) -> PreTrainedModel:
    quiet_libraries()
    require_model(folder)
    require_kernels(torch, device().index)
    try:
        config = model_config(folder, family, final_softcap)
        implementation = models_attention.choose_implementation(config, attention)
        log.debug(f"{folder}: {family.entry.model_class} in {dtype}, attention {implementation}")
        model, info = family.model_class.from_pretrained(
            folder,
            config=config,
            attn_implementation=implementation,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if quantization == "none" else _quantization_arguments(dtype, quantization, family)),
        )
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        for path in sorted(folder.glob("*.safetensors")):
            read_safetensors_header(path)  # raises the error with the file's name
        raise UserError(f"{folder}: the model cannot be loaded: {load_error_message(error)}") from None
    except UnpicklingError:
        problem = f"{folder}: the weights hold more than tensors; loading them could run somebody's code"
        raise UserError(problem, "Take a model with safetensors.") from None
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        lost = _original_message(error)
        if is_out_of_memory(RuntimeError(lost)):
            raise RuntimeError(lost) from None
        problem = f"{folder}: the model cannot be loaded: {load_error_message(error, folder)}"
        raise UserError(f"{problem}: {lost.splitlines()[0]}" if lost else problem) from None
    _raise_key_mismatch(folder, info)
    validate_model(model, str(folder))
    models_attention.apply_final_softcap(model)
    if quantization != "none":
        _keep_4bit_layout(model)
        layers = sum(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules())
        log.info(f"{quantization}: {layers} linear layers of the language model; everything else is {dtype}")
    return model


def _original_message(error: Exception) -> str:
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


def _quantization_arguments(dtype: str, quantization: str, family: ModelFamily) -> dict[str, Any]:
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
        llm_int8_skip_modules=list(family.never_quantized), **(nf4 if quantization == "nf4" else {"load_in_8bit": True})
    )
    return {"quantization_config": settings, "device_map": {"": device()}}


def _keep_4bit_layout(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are stored.

    On CPUs with AVX512-BF16, bitsandbytes repacks them in place when a layer is first used in evaluation mode: layers
    of other shapes than its kernel's then fail, scales are rounded to bfloat16, and no gradient passes from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@offline()
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
    load_adapter_weights(adapted, folder)
    return adapted


@offline()
def load_adapter_weights(adapted: torch.nn.Module, folder: Path) -> None:
    """Put a saved adapter's weights into a model that has an adapter of the same shape.

    Raises:
        UserError: their keys, shapes or scales differ, or the file is damaged.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
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
        raise UserError(f"{folder}: the adapter cannot be loaded: {load_error_message(error)}") from None
    expected = get_peft_model_state_dict(adapted)
    odd = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    keys = {"missing_keys": set(expected) - set(weights), "unexpected_keys": set(weights) - set(expected)}
    _raise_key_mismatch(folder, {**keys, "mismatched_keys": odd})
    set_peft_model_state_dict(adapted, weights)


def model_config(
    folder: Path, family: ModelFamily, final_softcap: models_attention.FinalSoftcapChoice
) -> PreTrainedConfig:
    """The model's own config, with what its family does otherwise."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not family.local_attention:
        models_attention.use_full_attention(config)
    models_attention.configure_final_softcap(config, final_softcap, usual=family.final_softcap)
    return config


def _raise_key_mismatch(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
            word = kind.removesuffix("_keys")
            raise UserError(f"{folder}: {len(keys)} {word} weights: {shown}", "The files do not belong to this model.")
