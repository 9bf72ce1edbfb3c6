"""Whether a model keeps rows apart that are packed into one sequence."""

from __future__ import annotations

import torch

from ftlib.errors import UserError
from ftlib.models.families import Inputs
from ftlib.models.rows import forward_arguments

_TEXTS = ("One row.", "7 dogs!?", "And another")
_TOLERANCE = 0.05
"""Of the logits' spread. Where rows are apart nothing changes, but for rounding in mixtures of experts and 8 bits."""


def check_packing(model: torch.nn.Module, inputs: Inputs) -> None:
    """Refuse an architecture in which a packed row's logits depend on the row before it.

    Some take positions and make their masks without them (OPT, Falcon); convolutions and recurrences carry on from one
    token to the next. Neither weights, random state nor the model's mode change.

    Raises:
        UserError: the rows see each other.
    """
    first, other, row = (inputs.answer_ids(text) for text in _TEXTS)
    before = min(len(first), len(other))
    mode, device = model.training, next(model.parameters()).device
    places = torch.tensor([[*range(before), *range(len(row))]], device=device)
    model.eval()
    with torch.no_grad():
        one, two = (
            model(
                **forward_arguments(
                    {"input_ids": torch.tensor([[*ids[:before], *row]], device=device), "position_ids": places}
                )
            ).logits[:, before:]
            for ids in (first, other)
        )
    model.train(mode)
    if (one - two).abs().max() > _TOLERANCE * one.float().std():
        kind = model.config.model_type  # type: ignore[union-attr]
        problem = f"loss.packing: in this model's architecture ({kind}) rows that share a sequence see each other"
        raise UserError(problem, "Set loss.packing: false.")
