"""The loss on the answer, from logits only where there are labels.

With left padding all labels of a batch stand in its last columns, so the head (257,152 wide) is computed only there:
the same number as from all logits, in a fraction of the memory.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ftlib.models.rows import IGNORED, forward_arguments

Average = Literal["token", "example"]


def answer_loss(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    average: Average,
    items: Tensor | int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of answer and `<eos>`.

    Args:
        batch: as `Inputs.batch` makes it, padded on the left; its labels may be cut to their last columns.
        average: `token` divides the sum over all answer tokens by their number; `example` first averages each row over
            its own tokens (big_vision, trainers/proj/paligemma), then over the rows.
        items: the number to divide by if the batch is a micro-batch of a bigger one: what `count_items` says of the
            whole. The micro-batches' losses then add up to the loss of the whole.
        smoothing: the share of a target's probability that all tokens get alike (Szegedy et al. 2016, section 7).

    Returns:
        Scalar.
    """
    labels = batch["labels"]
    width = labels.shape[1] if labels.shape[1] < batch["input_ids"].shape[1] else label_width(labels)
    logits = model(**forward_arguments(batch), logits_to_keep=width + 1).logits[:, :-1]
    return loss_of_logits(logits, labels[:, -width:], average, items, smoothing)


def loss_of_logits(
    logits: Tensor, labels: Tensor, average: Average, items: Tensor | int | None = None, smoothing: float = 0.0
) -> Tensor:
    """The same from logits that already stand one before their labels.

    Args:
        logits: shape (rows, width, vocabulary), any float type; computed in float32.
        labels: shape (rows, width), `IGNORED` where there is no loss.
    """
    losses = cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )
    if average == "example":
        losses = losses.sum(dim=1) / labels.ne(IGNORED).sum(dim=1).clamp(min=1)
    return losses.sum() / (count_items(labels, average) if items is None else items)


def count_items(labels: Tensor, average: Average) -> Tensor:
    """How many things the loss averages over: answer tokens, or rows that have any."""
    labelled = labels.ne(IGNORED)
    return labelled.sum() if average == "token" else labelled.any(dim=1).sum()


def label_width(labels: Tensor) -> int:
    """How many of the last columns hold labels; one at least, though a rank's share may have none."""
    columns = labels.ne(IGNORED).any(dim=0)
    columns[-1] = True
    return int(columns.shape[0] - int(columns.nonzero()[0]))
