"""What is read of a model are logits in its last columns: of answers in training (`loss.answer_logits`), of the last
token when a prompt is read for generation. The model computes no more than they need.

What the MLP of the last layer adds to the other columns reaches no logit: only attention carries something from one
column to another, and none comes after it. So it is left out there, which changes no loss, no gradient and no answer.
In training an MLP with dropout is computed whole: it would draw other random numbers, and a run that is resumed would
become another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

_MLP_NAMES = ("mlp", "feed_forward")
_ACTIVATIONS = tuple({one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values()})
_BY_COLUMN = (torch.nn.Linear, Conv1D, torch.nn.Dropout, *_ACTIVATIONS)
"""Layers whose output at a position depends on the input there alone; LoRA's and DoRA's are such layers, too."""
_NOT_BY_COLUMN = "Linear8bitLt"
"""bitsandbytes' layer, a kind of Linear: which features it computes in float16 depends on all positions."""


class _LastColumns:
    """Hooks with which an MLP computes only its last columns.

    Attributes:
        columns: how many; None or 0: all.
    """

    def __init__(self, columns: int | None = None) -> None:
        self.columns = columns
        self._length = 0

    def register(self, mlp: torch.nn.Module) -> list[RemovableHandle]:
        """Add the hooks."""
        return [mlp.register_forward_pre_hook(self._cut), mlp.register_forward_hook(self._fill_up)]

    def _applies(self, mlp: torch.nn.Module) -> bool:
        return True

    def _cut(self, mlp: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._length = 0
        if not self.columns or len(inputs) != 1 or inputs[0].dim() != 3 or not self._applies(mlp):
            return None
        hidden, self._length = inputs[0], inputs[0].shape[1]
        return (hidden[:, -self.columns :].contiguous(),)

    def _fill_up(self, mlp: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        missing = self._length - output.shape[1] if self._length else 0
        return pad(output, (0, 0, missing, 0)) if missing else output


class KeptColumns(_LastColumns):
    """Makes a model compute only what its last columns need, in training mode.

    Args:
        model: without adapters, which may be added afterwards.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
        mlp = _last_mlp(model)
        if mlp and not mlp._forward_hooks:  # such as those of `dropout.add_dropout`
            self.register(mlp)

    def watch(self, outermost: torch.nn.Module) -> None:
        """Read from the calls of this module, the model or what wraps it, how many columns of logits are wanted."""
        outermost.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self.columns = named.get("logits_to_keep")

    def _applies(self, mlp: torch.nn.Module) -> bool:
        return mlp.training and not _draws(mlp)


@contextmanager
def last_column_only(model: torch.nn.Module) -> Iterator[None]:
    """Forward passes in here, in evaluation mode, are only right about the logits in the last column; states that a
    cache keeps are right in all columns.

    Args:
        model: with adapters of peft, if it has any.
    """
    mlp = _last_mlp(model)
    handles = _LastColumns(1).register(mlp) if mlp else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _draws(mlp: torch.nn.Module) -> bool:
    """Whether the MLP, with its adapters, has dropout."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in mlp.modules())


def _make_contiguous(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With some of the columns, torch would multiply a frozen head with every row on its own."""
    return (inputs[0].contiguous(), *inputs[1:])


def _last_mlp(model: Any) -> torch.nn.Module | None:
    """The MLP of the last layer of the language model; None without one, or where it is no plain MLP (experts)."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not layers:
        return None
    found: list[torch.nn.Module] = [getattr(layers[-1], name) for name in _MLP_NAMES if hasattr(layers[-1], name)]
    if len(found) != 1:
        return None
    modules = found[0].named_modules()
    leaves = [module for name, module in modules if not [*module.children()] and "lora_" not in name]
    by_column = all(isinstance(leaf, _BY_COLUMN) and type(leaf).__name__ != _NOT_BY_COLUMN for leaf in leaves)
    return found[0] if by_column else None
