"""Rows of token ids and how they become batches: what all model families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that carries no loss, as in torch's cross entropy."""

NO_IMAGE = torch.empty(0)


@dataclass(frozen=True)
class Row:
    """One encoded row.

    Attributes:
        ids: token ids, image tokens included.
        n_answer: how many of the last ids carry labels (answer and end, as a rule); 0 when asking.
        pixels: shape (3, size, size), in [-1, 1]; empty for a row of text.
    """

    ids: list[int]
    n_answer: int
    pixels: Tensor = NO_IMAGE


def left_padded(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Rows stacked so that all of them end in the last column.

    Returns:
        input_ids, attention_mask, labels: shape (rows, longest), int64.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.ids) :] = torch.tensor(row.ids)
        mask[index, longest - len(row.ids) :] = 1
        labels[index, longest - row.n_answer :] = ids[index, longest - row.n_answer :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def positions(mask: Tensor, first: int) -> Tensor:
    """The position of every token, counted from `first` and not counting padding; shape as the mask's."""
    return mask.cumsum(dim=-1).clamp(min=1) - 1 + first


def forward_arguments(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: everything but the labels, and positions that do not count padding.

    PaliGemma's `token_type_ids` must go in, or its prompt becomes causal; its positions count from 1, as transformers
    counts them. A causal model's batch brings its own. Where rows are packed, no mask goes in: transformers keeps rows
    apart by positions that start anew, as long as no cache is made. Nobody reads a cache here, and it would hold keys
    and values of all layers.
    """
    arguments: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if "position_ids" not in arguments:
        arguments["position_ids"] = positions(batch["attention_mask"], first=1)
    return {**arguments, "use_cache": False}


def shortened(row: Row, limit: int | None, room: int, start: int) -> Row:
    """A question that leaves room for an answer: what is too much goes from its beginning.

    Args:
        limit: the model's positions; None: no limit.
        room: tokens kept free for the answer.
        start: tokens at the very beginning that stay (bos).
    """
    if limit is None or len(row.ids) + room <= limit:
        return row
    tail = max(1, limit - room - start)
    return replace(row, ids=[*row.ids[:start], *row.ids[-tail:]])
