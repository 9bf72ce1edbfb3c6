"""Training data: rows that fit the model, which rows go into which batch, and rows from disk to tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ftlib.core import log
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.data.example import MAX_ERRORS_SHOWN, Example, raise_all
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import PromptTemplates, render_prompt
from ftlib.data.splits import hash_text
from ftlib.errors import UserError
from ftlib.models.encoding import IGNORE_INDEX, EncodedExample
from ftlib.models.lengths import cached_token_lengths
from ftlib.models.registry import InputProcessor

# Row lengths, and batches of few shapes.
#
# Rows of an effective batch are cut into micro-batches by length, so that little is padded. For `torch_compile`, which
# compiles every shape anew, all batches are padded to one of `MAX_SHAPES` lengths; with a fixed number of image tokens
# these are lengths of text.

MAX_SHAPES = 4


def training_lengths(
    examples: Sequence[Example],
    indices: Sequence[int],
    templates: PromptTemplates,
    processor: InputProcessor,
    cache: Path | None = None,
) -> list[tuple[int, int]]:
    """(tokens, of them answer) of the examples at the places `indices`, as `InputProcessor.encode_train` cuts them."""
    lengths = cached_token_lengths(examples, templates, processor, cache)[np.asarray(indices, dtype=np.int64)]
    prompts, tokens = lengths[:, 0], lengths.sum(axis=1)
    if processor.max_length:
        tokens = np.minimum(tokens, processor.max_length)
    return list(zip(tokens.tolist(), (tokens - prompts).tolist(), strict=True))


class BucketedCollator:
    """Collates rows into batches of one of a few lengths, with as many columns of labels as that length may need.

    Args:
        lengths: (tokens, of them labelled) of every row that can come.
    """

    def __init__(self, processor: InputProcessor, lengths: Sequence[tuple[int, int]]) -> None:
        self.processor = processor
        ordered = sorted(tokens for tokens, _ in lengths)
        ends = [-(-len(ordered) * part // MAX_SHAPES) - 1 for part in range(1, MAX_SHAPES + 1)]
        self.shapes = {
            length: max(labelled for tokens, labelled in lengths if tokens <= length)
            for length in sorted({ordered[end] for end in ends})
        }
        """Row length → width of the labels; each length is a quantile, so that equally many rows have it."""

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """`InputProcessor.collate`, padded on the left to the next length; labels are cut to their last columns."""
        batch = self.processor.collate(rows)
        longest = batch["input_ids"].shape[1]
        length = next(length for length in self.shapes if length >= longest)
        fillers = {"input_ids": self.processor.pad_token_id, "labels": IGNORE_INDEX}
        padded = {
            name: pad(tensor, (length - longest, 0), value=fillers.get(name, 0)) if tensor.dim() == 2 else tensor
            for name, tensor in batch.items()
        }
        return {**padded, "labels": padded["labels"][:, -self.shapes[length] :]}


# Which rows go into which batch, and rows from disk to tensors.


class SupervisedDataset(Dataset[EncodedExample]):
    """A split as encoded rows; images are opened when a row is asked for. Place `~n` is row n without its labels.

    Args:
        templates: the prompts, see `prompts.render_prompt`.
        indices: the places of the examples to learn from, as `filter_by_length` finds them.
        sampler: which of them an epoch sees, by their number in `indices`.
        max_pixels: see `images.open_image`.
        cache: of the examples' lengths, see `models.lengths.length_cache_path`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        root: Path,
        templates: PromptTemplates,
        processor: InputProcessor,
        indices: Sequence[int],
        sampler: MixtureSampler,
        max_pixels: int | None = None,
        cache: Path | None = None,
    ) -> None:
        self.examples = examples
        self.root = root
        self.templates = templates
        self.processor = processor
        self.indices = indices
        self.sampler = sampler
        self.max_pixels = max_pixels
        self.cache = cache

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> EncodedExample:
        if index < 0:
            return replace(self[~index], n_labels=0)
        example = self.examples[self.indices[index]]
        path = image_path(self.root, example.image)
        image = open_image(path, example.frame, example.digest, self.max_pixels) if example.image else None
        return self.processor.encode_train(render_prompt(example, self.templates), image, example.suffix)

    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, of them answer) of every row."""
        return training_lengths(self.examples, self.indices, self.templates, self.processor, self.cache)


class MixtureSampler:
    """Which rows an epoch sees: of each dataset of a mixture its rows times its weight, rounded, at least one.

    A dataset's rows are gone through again and again, each time in another order that the seed gives; an epoch takes up
    where the last one ended. So after any number of epochs no row of a dataset was seen more than once more often than
    another. With weights of 1 every row is seen once an epoch.

    Args:
        sizes: number of rows of each dataset; their numbers follow one another.
        weights: how often each of a dataset's rows is seen in an epoch, on average.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = sizes
        self.counts = [max(1, round(size * weight)) if size else 0 for size, weight in zip(sizes, weights, strict=True)]
        self.seed = seed

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(self, number: int) -> Tensor:
        """The rows of an epoch, dataset after dataset, shape (len,), int64."""
        starts = accumulate(self.sizes[:-1], initial=0)
        return torch.cat([self._dataset_rows(dataset, number) + start for dataset, start in enumerate(starts)])

    def _dataset_rows(self, dataset: int, number: int) -> Tensor:
        """The rows of one dataset in an epoch, from 0."""
        size, count = self.sizes[dataset], self.counts[dataset]
        taken = [torch.empty(0, dtype=torch.int64)]
        start, end = number * count, (number + 1) * count
        while start < end:
            round_, first = divmod(start, size)
            last = min(size, first + end - start)
            whole = last - first == size  # in which order does not matter: an epoch is shuffled
            taken.append(torch.arange(size) if whole else self._permutation(dataset, round_)[first:last])
            start += last - first
        return torch.cat(taken)

    def _permutation(self, dataset: int, round_: int) -> Tensor:
        """A dataset's rows in the order in which they are gone through this time."""
        generator = torch.Generator().manual_seed(hash_text(f"{self.seed} {dataset} {round_}") >> 1)
        return torch.randperm(self.sizes[dataset], generator=generator)


class GlobalBatchSampler:
    """Batch sampler: shuffles each epoch by (seed, epoch) and cuts whole effective batches for ranks and micro-batches.

    The rows that an optimizer step sees therefore do not depend on how they are cut. The last effective batch of an
    epoch may be smaller. All ranks get equally many micro-batches; one whose rows have run out gets a row without
    labels (a negative place, see `SupervisedDataset`).

    Args:
        lengths: tokens of every row; rows of a step are then cut by length, the longest first.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.sampler = sampler
        self.rows = len(sampler) - len(sampler) % batch_size if drop_last else len(sampler)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.batch_size)
        cuts = [num_micro_batches(batch, self.micro_batch_size, self.world_size) for batch in (self.batch_size, rest)]
        return whole * cuts[0] + cuts[1]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = self.sampler.epoch(self.epoch)
        order = drawn[torch.randperm(len(drawn), generator=generator)[: self.rows]].tolist()
        for start in range(0, self.rows, self.batch_size):
            batch = self._sort_by_length(order[start : start + self.batch_size])
            mine = batch[self.rank :: self.world_size]  # so that every rank gets long ones and short ones
            for cut in range(0, math.ceil(len(batch) / self.world_size), self.micro_batch_size):
                yield mine[cut : cut + self.micro_batch_size] or [~batch[0]]

    def _sort_by_length(self, batch: list[int]) -> list[int]:
        lengths = self.lengths
        return batch if lengths is None else sorted(batch, key=lambda row: -lengths[row])


def num_micro_batches(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Into how many micro-batches each rank's share of so many rows is cut."""
    return math.ceil(math.ceil(rows / world_size) / micro_batch_size)


# What is found before the first step: rows that do not fit the model, and images that its processor rejects.
#
# A row longer than the model's positions is dropped, truncated or refused, and always counted and named.

_CHUNK = 1000
"""Images that are opened together."""


@dataclass(frozen=True)
class LengthFilterResult:
    """Which examples are learned from.

    Attributes:
        indices: their places, in order.
        limit: tokens that a row may have; None: nothing was looked at.
        dropped, truncated: how many were too long.
        unanswered: how many of the dropped have a prompt that leaves no room for any answer: no label would be left.
        messages: the first of the rows that were too long, in words.
        split: which rows, in words.
    """

    indices: Sequence[int]
    limit: int | None = None
    dropped: int = 0
    truncated: int = 0
    unanswered: int = 0
    messages: Sequence[str] = ()
    split: str = "training"

    @property
    def summary(self) -> str:
        """What to tell the user; empty if every row fits."""
        if not (self.dropped or self.truncated):
            return ""
        total = len(self.indices) + self.dropped
        fates = [(self.dropped, "dropped"), (self.truncated, "truncated")]
        shown = " and ".join(f"{count:,} {fate}" for count, fate in fates if count)
        filled = f" (the prompts of {self.unanswered:,} leave no room for an answer)" if self.unanswered else ""
        first = f"of {total:,} {self.split} rows, those of more than {self.limit:,} tokens were too long: {shown}"
        more = self.dropped + self.truncated - len(self.messages)
        rest = [f"  … and {more:,} more"] if more else []
        return "\n".join([first + filled, *[f"  {row}" for row in self.messages], *rest])


def filter_by_length(
    examples: Sequence[Example],
    templates: PromptTemplates,
    processor: InputProcessor,
    too_long: Literal["drop", "truncate", "stop"],
    split: str = "training",
    cache: Path | None = None,
) -> LengthFilterResult:
    """Compare every row's length with what the model takes.

    A row whose answer would be cut off wholly is dropped even where others are truncated: nothing would be left to
    learn.

    Args:
        cache: of their lengths, see `models.lengths.length_cache_path`.

    Raises:
        UserError: rows that are too long, for `stop`; no row fits.
    """
    if processor.max_length is None:
        return LengthFilterResult(range(len(examples)), split=split)
    limit = processor.max_length
    lengths = cached_token_lengths(examples, templates, processor, cache)
    prompts = lengths[:, 0]
    excess = lengths.sum(axis=1) > limit
    too_many = np.flatnonzero(excess).tolist()
    if too_long != "stop":
        too_many = too_many[:MAX_ERRORS_SHOWN]
    faults = [
        _length_error(examples[index].id, int(lengths[index, 0]), int(lengths[index, 1]), limit) for index in too_many
    ]
    if too_long == "stop":
        raise_all(faults, "Shorten them, or set model.too_long: drop or truncate.")
    truncated = excess & (prompts < limit) if too_long == "truncate" else np.zeros_like(excess)
    kept = np.flatnonzero(~excess | truncated)
    if not len(kept):
        raise UserError(f"none of {len(examples):,} {split} rows fits into {limit:,} tokens", faults[0])
    return LengthFilterResult(
        kept.tolist() if len(kept) < len(examples) else range(len(examples)),
        limit,
        dropped=len(examples) - len(kept),
        truncated=int(truncated.sum()),
        unanswered=int((excess & (prompts >= limit)).sum()),
        messages=faults,
        split=split,
    )


def _length_error(name: str, prompt: int, answer: int, limit: int) -> str:
    filled = f"; its prompt alone has {prompt:,}: no room for an answer" if prompt >= limit else ""
    return f"row {name}: {prompt + answer:,} tokens, the model takes {limit:,}{filled}"


def validate_images(
    rows: Iterable[Example], root: Path, processor: InputProcessor, max_pixels: int | None = None
) -> int:
    """Open every image once, as training will, and show it to the model's processor.

    Args:
        max_pixels: see `images.open_image`.

    Returns:
        How many there are.

    Raises:
        UserError: images that cannot be used, each with the first row that shows it.
    """
    first: dict[tuple[str, int, str], str] = {}
    for row in rows:
        if row.image:
            first.setdefault((row.image, row.frame, row.digest), row.id)
    faults = []

    def inspect(image: str, frame: int, digest: str) -> str:
        try:
            processor.encode_prompts([""], open_image(image_path(root, image), frame, digest, max_pixels))
        except UserError as error:
            return error.problem
        except Exception as error:  # what a processor raises is its own affair
            if is_out_of_memory(error):
                raise
            return f"{image}: the model's processor rejects it: {error}"
        return ""

    shown = list(first)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, log.progress("images", len(shown)) as update:
        for start in range(0, len(shown), _CHUNK):
            chunk = shown[start : start + _CHUNK]
            for number, (one, problem) in enumerate(
                zip(chunk, pool.map(inspect, *zip(*chunk, strict=True)), strict=True)
            ):
                faults += [f"row {first[one]}: {problem}"] if problem else []
                update(start + number + 1, "")
    raise_all(faults, "Mend or remove them, then run `ftlib prepare CONFIG --again`.")
    return len(shown)
