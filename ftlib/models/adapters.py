"""What is trained: low-rank adapters, or the weights themselves."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftlib.config import Full, Lora
from ftlib.errors import UserError
from ftlib.models.families import FAMILIES, Family


def prepare_for_training(
    model: PreTrainedModel, adapter: Lora | Full, base_name: str, family: str = "paligemma"
) -> torch.nn.Module:
    """Mark the trainable parameters, adding adapters if the method has any.

    Args:
        base_name: what the saved adapter names as its base model.

    Raises:
        UserError: everything would be frozen.
    """
    kind = FAMILIES[family]
    if isinstance(adapter, Full):
        trainable: torch.nn.Module = _freeze(model, kind, adapter)
    else:
        trainable = _add_lora(model, kind, adapter, base_name)
    if not any(parameter.requires_grad for parameter in trainable.parameters()):
        raise UserError("adapter.freeze: nothing is left to train")
    return trainable


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _freeze(model: PreTrainedModel, family: Family, adapter: Full) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.part(model, name) not in adapter.freeze)
    return model


def _add_lora(model: PreTrainedModel, family: Family, adapter: Lora, base_name: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=family.lora_modules(model, adapter),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights lie transposed
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name  # not the folder it was read from
    return adapted
