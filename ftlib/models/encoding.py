"""Rows of token ids and how they become batches: what all model families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that carries no loss, as in torch's cross entropy."""

NO_IMAGE = torch.empty(0)


@dataclass(frozen=True)
class EncodedExample:
    """One encoded row.

    Attributes:
        input_ids: token ids, image tokens included.
        n_labels: how many of the last ids carry labels (answer and end, as a rule); 0 when asking.
        pixel_values: shape (3, size, size), in [-1, 1]; empty for a row of text.
    """

    input_ids: list[int]
    n_labels: int
    pixel_values: Tensor = NO_IMAGE


def pad_left(rows: Sequence[EncodedExample], pad_token_id: int) -> dict[str, Tensor]:
    """Rows stacked so that all of them end in the last column.

    Returns:
        input_ids, attention_mask, labels: shape (rows, longest), int64.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.input_ids) :] = torch.tensor(row.input_ids)
        mask[index, longest - len(row.input_ids) :] = 1
        labels[index, longest - row.n_labels :] = ids[index, longest - row.n_labels :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def position_ids(mask: Tensor, first: int) -> Tensor:
    """The position of every token, counted from `first` and not counting padding; shape as the mask's."""
    return mask.cumsum(dim=-1).clamp(min=1) - 1 + first


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: everything but the labels, and positions that do not count padding.

    PaliGemma's `token_type_ids` must go in, or its prompt becomes causal; its positions count from 1, as transformers
    counts them. A causal model's batch brings its own. Where rows are packed, no mask goes in: transformers keeps rows
    apart by positions that start anew, as long as no cache is made. Nobody reads a cache here, and it would hold keys
    and values of all layers.
    """
    arguments: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if "position_ids" not in arguments:
        arguments["position_ids"] = position_ids(batch["attention_mask"], first=1)
    return {**arguments, "use_cache": False}


def truncate_left(
    row: EncodedExample, max_length: int | None, max_new_tokens: int, prefix_length: int
) -> EncodedExample:
    """A question that leaves room for an answer: what is too much goes from its beginning.

    Args:
        max_length: the model's positions; None: no limit.
        max_new_tokens: tokens kept free for the answer.
        prefix_length: tokens at the very beginning that stay (bos).
    """
    if max_length is None or len(row.input_ids) + max_new_tokens <= max_length:
        return row
    tail = max(1, max_length - max_new_tokens - prefix_length)
    return replace(row, input_ids=[*row.input_ids[:prefix_length], *row.input_ids[-tail:]])
