"""Training computes what the loss reads: logits in the last columns (`loss.answer_logits`), and no more than they need.

What the MLP of the last layer adds to the other columns reaches no logit: only attention carries something from one
column to another, and none comes after it. So it is left out there, which changes no loss and no gradient. An MLP with
dropout is computed whole: it would draw other random numbers, and a run that is resumed would become another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

_MLP_NAMES = ("mlp", "feed_forward")
_ACTIVATIONS = tuple({one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values()})
_BY_COLUMN = (torch.nn.Linear, Conv1D, torch.nn.Dropout, *_ACTIVATIONS)
"""Layers whose output at a position depends on the input there alone."""


class KeptColumns:
    """Makes a model compute only what its last columns need, in training mode.

    Args:
        model: without adapters, which may be added afterwards.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._columns: int | None = None
        self._length = 0
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
        if mlp := _last_mlp(model):
            mlp.register_forward_pre_hook(self._cut)
            mlp.register_forward_hook(self._fill_up)

    def watch(self, outermost: torch.nn.Module) -> None:
        """Read from the calls of this module, the model or what wraps it, how many columns of logits are wanted."""
        outermost.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self._columns = named.get("logits_to_keep")

    def _cut(self, mlp: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._length = 0
        if not mlp.training or not self._columns or len(inputs) != 1 or inputs[0].dim() != 3 or _draws(mlp):
            return None
        hidden, self._length = inputs[0], inputs[0].shape[1]
        return (hidden[:, -self._columns :].contiguous(),)

    def _fill_up(self, mlp: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        missing = self._length - output.shape[1] if self._length else 0
        return pad(output, (0, 0, missing, 0)) if missing else output


def _draws(mlp: torch.nn.Module) -> bool:
    """Whether the MLP, with its adapters, has dropout."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in mlp.modules())


def _make_contiguous(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With some of the columns, torch would multiply a frozen head with every row on its own."""
    return (inputs[0].contiguous(), *inputs[1:])


def _last_mlp(model: PreTrainedModel) -> torch.nn.Module | None:
    """The MLP of the last layer of the language model; None without one, or where it is no plain MLP (experts; hooks
    such as those of `dropout.add_dropout`).
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not layers:
        return None
    found = [getattr(layers[-1], name) for name in _MLP_NAMES if hasattr(layers[-1], name)]
    if len(found) != 1 or found[0]._forward_hooks:
        return None
    leaves = [module for module in found[0].modules() if not [*module.children()]]
    return found[0] if all(isinstance(leaf, _BY_COLUMN) for leaf in leaves) else None
