"""The loss on the answer, from logits only where there are labels.

With left padding all labels of a batch stand in its last columns, so the head (257,152 wide) is computed only there:
the same number as from all logits, in a fraction of the memory. In training the head returns losses instead of logits
where it can (`linear_cross_entropy.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ftlib.models.encoding import IGNORE_INDEX, model_inputs
from ftlib.models.linear_cross_entropy import request_losses

Average = Literal["token", "example"]


def answer_loss(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    average: Average,
    items: Tensor | int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of answer and `<eos>`.

    Args:
        batch: as `InputProcessor.collate` makes it, padded on the left; its labels may be cut to their last columns
            (`cut_labels`): as many logits are computed as there are columns of labels.
        average: `token` divides the sum over all answer tokens by their number; `example` first averages each row over
            its own tokens (big_vision, trainers/proj/paligemma), then over the rows.
        items: the number to divide by if the batch is a micro-batch of a bigger one: what `count_items` says of the
            whole. The micro-batches' losses then add up to the loss of the whole.
        smoothing: the share of a target's probability that all tokens get alike (Szegedy et al. 2016, section 7).

    Returns:
        Scalar.
    """
    labels = _aligned_labels(batch)
    with request_losses(labels, smoothing) as request:
        output = _keep_columns(model, batch, labels)
    if request.head is None:
        return loss_of_logits(output, labels, average, items, smoothing)
    losses = request.losses(output)
    if losses is None:
        del output  # with all that its backward pass would need
        return loss_of_logits(_keep_columns(model, batch, labels), labels, average, items, smoothing)
    return _average(losses, labels, average, items)


def answer_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of the columns with labels, and these labels, for `loss_of_logits`."""
    labels = _aligned_labels(batch)
    return _keep_columns(model, batch, labels), labels


def _aligned_labels(batch: dict[str, Tensor]) -> Tensor:
    width = min(batch["labels"].shape[1], batch["input_ids"].shape[1] - 1)
    # The last position has no next token to predict and gets an ignored label: cutting it off would copy the others.
    return pad(batch["labels"][:, -width:], (0, 1), value=IGNORE_INDEX)


def _keep_columns(model: torch.nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    output: Tensor = model(**model_inputs(batch), logits_to_keep=labels.shape[1]).logits
    return output


def loss_of_logits(
    logits: Tensor, labels: Tensor, average: Average, items: Tensor | int | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the loss from logits that are aligned with their labels.

    Args:
        logits: shape (rows, width, vocabulary), any float type; computed in float32.
        labels: shape (rows, width), `IGNORE_INDEX` where there is no loss.
    """
    flat = logits.float().flatten(0, 1)  # over a transposed vocabulary the loss would copy all logits
    losses = cross_entropy(
        flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    ).view_as(labels)
    return _average(losses, labels, average, items)


def _average(losses: Tensor, labels: Tensor, average: Average, items: Tensor | int | None) -> Tensor:
    if average == "example":
        losses = losses.sum(dim=1) / labels.ne(IGNORE_INDEX).sum(dim=1).clamp(min=1)
    return losses.sum() / (count_items(labels, average) if items is None else items)


def count_items(labels: Tensor, average: Average) -> Tensor:
    """Return the number of items that the loss averages over: answer tokens, or rows with answer tokens."""
    labelled = labels.ne(IGNORE_INDEX)
    return labelled.sum() if average == "token" else labelled.any(dim=1).sum()


def cut_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch whose labels are cut to the last columns with labels (at least one, for a rank without labels).

    For batches on the CPU: the number of columns depends on the labels, and reading it from a GPU
    tensor would wait for the GPU.
    """
    columns = batch["labels"].ne(IGNORE_INDEX).any(dim=0)
    columns[-1] = True
    return {**batch, "labels": batch["labels"][:, int(columns.nonzero()[0]) :]}
