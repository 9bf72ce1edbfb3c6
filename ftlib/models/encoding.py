"""Rows of token ids and how they become batches: what all model families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

IGNORE_INDEX = -100
"""The label of a position that carries no loss, as in torch's cross entropy."""


@dataclass(frozen=True)
class EncodedExample:
    """One encoded row.

    Attributes:
        input_ids: token ids, image tokens included.
        n_labels: how many of the last ids carry labels (answer and end, as a rule); 0 when asking.
        image_inputs: the model's arguments for the row's images, such as pixel_values, or their levels with a lookup
            table (`LOOKUP`); empty for a row of text. Rows about the same images share the object, so that PaliGemma's
            vision tower sees these images once.
        gaps: (start, end) of the ids among the last `n_labels` that carry no labels after all: turns of the user
            between two answers.
        n_kept: how many ids at the beginning stay when the row is truncated (its images, bos); 0: as the family says.
    """

    input_ids: list[int]
    n_labels: int
    image_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gaps: tuple[tuple[int, int], ...] = ()
    n_kept: int = 0


Size = tuple[int, int]
"""Width and height of an image in pixels."""

Images = Image.Image | Sequence[Image.Image] | None
"""The images of a row: one, several, or none."""


def as_images(images: Images) -> list[Image.Image]:
    """Images as a list."""
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image) else list(images)


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
        first = longest - len(row.input_ids)
        ids[index, first:] = torch.tensor(row.input_ids)
        mask[index, first:] = 1
        labels[index, longest - row.n_labels :] = ids[index, longest - row.n_labels :]
        for start, end in row.gaps:
            labels[index, first + start : first + end] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


PER_ROW = "_per_row"
"""Ends the name of a batch's tensor that says how many entries of an image argument are each row's, such as
`pixel_values_per_row`: shape (rows,), int64, no argument of the model. Missing where every row has one."""


LOOKUP = "_lookup"
"""Ends the name of a batch's tensor that says what the levels of an image argument stand for, such as
`pixel_values_lookup`: shape (channels, 256), float32. The argument itself then is uint8, shape (images, channels,
height, width): a quarter of the bytes to copy from workers to the device, where `look_up` makes it what the model
takes."""


def look_up(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with levels replaced by their values, float32, on the batch's device. Looked up and not computed,
    the values are the same on every device."""
    found = {name: tensor for name, tensor in batch.items() if not name.endswith(LOOKUP)}
    for name, table in batch.items():
        if name.endswith(LOOKUP):
            levels = found[name.removesuffix(LOOKUP)].contiguous()
            offsets = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=table.device)
            places = levels + offsets[:, None, None]
            values = table.flatten().index_select(0, places.flatten())
            found[name.removesuffix(LOOKUP)] = values.view(levels.shape)
    return found


def split_batch(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """A batch as batches of at most `size` rows, each with its own images, if it has any; columns stay as they are."""
    pieces: dict[str, Sequence[Tensor]] = {}
    tables = {name: tensor for name, tensor in batch.items() if name.endswith(LOOKUP)}
    for name, tensor in batch.items():
        if name in tables:
            continue
        counts = batch.get(f"{name}{PER_ROW}")
        lengths = size if counts is None else [int(part.sum()) for part in counts.split(size)]
        pieces[name] = tensor.split(lengths)
    found = [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
    for piece in found:
        for name in [name for name, tensor in piece.items() if not len(tensor)]:
            del piece[name], piece[f"{name}{PER_ROW}"]
        piece.update({name: table for name, table in tables.items() if name.removesuffix(LOOKUP) in piece})
    return found


def append_rows(batch: Mapping[str, Tensor], rows: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of text with rows that have images behind its own, which carry no labels.

    Args:
        batch: it may be on another device than the rows, and its labels may be cut to their last columns.
    """
    joined = {name: tensor.to(batch["input_ids"].device) for name, tensor in rows.items() if name not in batch}
    longest = max(batch["input_ids"].shape[1], rows["input_ids"].shape[1])
    fillers = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    for name, tensor in batch.items():
        width, filler = tensor.shape[1] if name == "labels" else longest, fillers.get(name, 0)
        more = torch.full_like(rows[name], IGNORE_INDEX) if name == "labels" else rows[name]
        more = more[:, -width:].to(tensor.device)
        both = [pad(one, (width - one.shape[1], 0), value=filler) for one in (tensor, more)]
        joined[name] = torch.cat(both)
    return joined


def labels_of(row: EncodedExample) -> list[int]:
    """The label of every id of a row."""
    ids = row.input_ids
    labels = [IGNORE_INDEX] * (len(ids) - row.n_labels) + ids[len(ids) - row.n_labels :]
    for start, end in row.gaps:
        labels[start:end] = [IGNORE_INDEX] * len(labels[start:end])
    return labels


def join_image_inputs(rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
    """The image arguments of a batch: joined along the first axis, in the order of the rows; and how many entries are
    each row's (`PER_ROW`), by which `split_batch` splits them again.

    Depending on the model that axis counts images, tiles or patches. Where other axes differ (tiles of an image, its
    height and width), zeros fill them up behind, as the processors of transformers do.
    """
    named: dict[str, list[Tensor]] = {}
    for row in rows:
        for name, tensor in row.image_inputs.items():
            named.setdefault(name, []).append(tensor)
    joined = {}
    for name, tensors in named.items():
        if name.endswith(LOOKUP):
            joined[name] = tensors[0]
            continue
        largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined[name] = torch.cat([_fill_up(tensor, largest) for tensor in tensors])
        counts = [len(row.image_inputs[name]) if name in row.image_inputs else 0 for row in rows]
        if set(counts) != {1}:
            joined[f"{name}{PER_ROW}"] = torch.tensor(counts)
    return joined


def _fill_up(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [side for count in reversed(missing) for side in (0, count)])


def position_ids(mask: Tensor, first: int) -> Tensor:
    """The position of every token, counted from `first` and not counting padding; shape as the mask's."""
    return mask.cumsum(dim=-1).clamp(min=1) - 1 + first


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: everything but the labels and how images are shared among rows, with levels of
    images replaced by their values (`look_up`).

    PaliGemma's `token_type_ids` must go in, or its prompt becomes causal. Where rows are packed, no mask goes in:
    transformers keeps rows apart by positions that start anew, as long as no cache is made. Nobody reads a cache here,
    and it would hold keys and values of all layers.
    """
    arguments = {name: value for name, value in batch.items() if name != "labels" and not name.endswith(PER_ROW)}
    return {**look_up(arguments), "use_cache": False}


def truncate_left(
    row: EncodedExample, max_length: int | None, max_new_tokens: int, prefix_length: int
) -> EncodedExample:
    """A question that leaves room for an answer: what is too much goes from its beginning.

    Args:
        max_length: the model's positions; None: no limit.
        max_new_tokens: tokens kept free for the answer.
        prefix_length: tokens at the very beginning that stay (bos), unless the row knows better.
    """
    prefix_length = row.n_kept or prefix_length
    if max_length is None or len(row.input_ids) + max_new_tokens <= max_length:
        return row
    tail = max(1, max_length - max_new_tokens - prefix_length)
    return replace(row, input_ids=[*row.input_ids[:prefix_length], *row.input_ids[-tail:]])
