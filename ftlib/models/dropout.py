"""Dropout inside PaliGemma's language model (`model.dropout`), which transformers' Gemma does not have.

As in the authors' code (big_vision, models/ppp/gemma.py, Block): on the output of attention, after its second norm if
it has one (Gemma 2), and on the output of the MLP, before its second norm. Every number is dropped independently, for
image and text. The masks come from torch's random state, which checkpoints contain, and gradient checkpointing repeats
them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Add dropout to every layer of PaliGemma's language model, in place; in evaluation mode it does nothing."""
    hook = partial(_drop, probability)
    for layer in model.model.language_model.layers:
        gemma2 = hasattr(layer, "pre_feedforward_layernorm")
        attended = layer.post_attention_layernorm if gemma2 else layer.self_attn
        attended.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def _drop(probability: float, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook; attention returns a tuple with its scores."""
    if isinstance(output, tuple):
        return (functional.dropout(output[0], probability, module.training), *output[1:])
    return functional.dropout(output, probability, module.training)
