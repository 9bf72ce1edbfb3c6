"""What is trained: low-rank adapters, or the weights themselves."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ftlib.config import Full, Lora
from ftlib.errors import UserError
from ftlib.models.paligemma import LINEAR_LAYERS, PARTS


def prepare_for_training(model: PreTrainedModel, adapter: Lora | Full, base_name: str) -> torch.nn.Module:
    """Mark the trainable parameters, adding adapters if the method has any.

    Args:
        base_name: what the saved adapter names as its base model.

    Raises:
        UserError: everything would be frozen.
    """
    trainable = _freeze(model, adapter) if isinstance(adapter, Full) else _add_lora(model, adapter, base_name)
    if not any(parameter.requires_grad for parameter in trainable.parameters()):
        raise UserError("adapter.freeze: nothing is left to train")
    return trainable


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _freeze(model: PreTrainedModel, adapter: Full) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_part(name) not in adapter.freeze)
    return model


def _part(name: str) -> str:
    """The part that a parameter belongs to; the (tied) head counts as embeddings."""
    if "lm_head" in name or PARTS["embeddings"] in name:
        return "embeddings"
    return next(part for part in ("vision", "projector", "language") if PARTS[part] in name)


def _add_lora(model: PreTrainedModel, adapter: Lora, base_name: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    layers = "|".join(layer for target in adapter.targets for layer in LINEAR_LAYERS[target])
    parts = "|".join(PARTS[part] for part in ("language", "vision") if part not in adapter.freeze)
    if not parts:
        raise UserError("adapter.freeze: nothing is left to adapt")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=rf".*({parts}).*\.({layers})",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name  # not the folder it was read from
    return adapted
