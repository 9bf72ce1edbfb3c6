"""Whether a model keeps rows apart that are packed into one sequence."""

from __future__ import annotations

import torch

from ftlib.errors import UserError
from ftlib.models.families import Inputs
from ftlib.models.rows import forward_arguments


def check_packing(model: torch.nn.Module, inputs: Inputs) -> None:
    """Refuse an architecture in which a packed row's logits depend on the row before it.

    Some take positions and make their masks without them (OPT, Falcon); convolutions and recurrences carry on from one
    token to the next. The gradient tells, in any type of numbers: of what is not seen it is zero, exactly, while 8-bit
    weights let the logits themselves change a little with whatever else is computed beside them. Neither weights,
    their gradients, random state nor the model's mode change.

    Raises:
        UserError: the rows see each other.
    """
    before, row = (inputs.answer_ids(text) for text in ("One row.", "And another?"))
    mode, device = model.training, next(model.parameters()).device
    ids = torch.tensor([[*before, *row]], device=device)
    places = torch.tensor([[*range(len(before)), *range(len(row))]], device=device)
    model.eval()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    arguments = forward_arguments({"inputs_embeds": embedded, "position_ids": places})
    logits = model(**arguments).logits[:, len(before) :]
    (gradient,) = torch.autograd.grad(logits.float().logsumexp(dim=-1).sum(), embedded)
    model.train(mode)
    if gradient[:, : len(before)].any():
        kind = model.config.model_type  # type: ignore[union-attr]
        problem = f"loss.packing: in this model's architecture ({kind}) rows that share a sequence see each other"
        raise UserError(problem, "Set loss.packing: false.")
