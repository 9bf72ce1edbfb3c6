"""Training data: length filtering, batch sampling, and loading and encoding of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ftlib.data.example import MAX_ERRORS_SHOWN, Example, ImageFile, raise_all
from ftlib.data.images import ReadFile, image_path, open_image, open_row_images, read_ahead
from ftlib.data.prompts import PromptTemplates, render_prompt
from ftlib.data.splits import hash_text
from ftlib.errors import UserError
from ftlib.models.encoding import IGNORE_INDEX, EncodedExample
from ftlib.models.lengths import ImageFolder, cached_token_lengths
from ftlib.models.registry import InputProcessor

# Row lengths, and batches of few shapes.
#
# The rows of an effective batch are sorted by length and cut into micro-batches, so that there is little padding. For
# `torch_compile`, which compiles every shape separately, all batches are padded to one of `MAX_SHAPES` lengths.

MAX_SHAPES = 4


def training_lengths(
    examples: Sequence[Example],
    indices: Sequence[int],
    templates: PromptTemplates,
    processor: InputProcessor,
    cache: Path | None = None,
    images: ImageFolder | None = None,
) -> list[tuple[int, int]]:
    """Return (tokens, answer tokens) of the examples at `indices`, as truncated by `InputProcessor.encode_train`."""
    lengths = cached_token_lengths(examples, templates, processor, cache, images)[np.asarray(indices, dtype=np.int64)]
    prompts, tokens = lengths[:, 0], lengths.sum(axis=1)
    if processor.max_length:
        tokens = np.minimum(tokens, processor.max_length)
    return list(zip(tokens.tolist(), (tokens - prompts).tolist(), strict=True))


class BucketedCollator:
    """Collates rows into batches of one of a few lengths, with the widest labels of any row up to that length.

    Args:
        lengths: (tokens, labelled tokens) of every row of the dataset.
    """

    def __init__(self, processor: InputProcessor, lengths: Sequence[tuple[int, int]]) -> None:
        self.processor = processor
        ordered = sorted(tokens for tokens, _ in lengths)
        ends = [-(-len(ordered) * part // MAX_SHAPES) - 1 for part in range(1, MAX_SHAPES + 1)]
        self.shapes = {
            length: max(labelled for tokens, labelled in lengths if tokens <= length)
            for length in sorted({ordered[end] for end in ends})
        }
        """Row length → width of the labels; the lengths are quantiles, so that each has about as many rows."""

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Collate, pad on the left to the next length, and cut the labels to their last columns."""
        batch = self.processor.collate(rows)
        shape = batch["input_ids"].shape
        longest = shape[1]
        length = next(length for length in self.shapes if length >= longest)
        fillers = {"input_ids": self.processor.pad_token_id, "labels": IGNORE_INDEX}
        padded = {
            name: pad(tensor, (length - longest, 0), value=fillers.get(name, 0)) if tensor.shape == shape else tensor
            for name, tensor in batch.items()
        }
        return {**padded, "labels": padded["labels"][:, -self.shapes[length] :]}


# Batch sampling, and loading and encoding of rows.


class SupervisedDataset(Dataset[EncodedExample]):
    """A split as encoded rows; images are opened on access. Index `~n` is row n without labels (padding).

    Args:
        templates: the prompts, see `prompts.render_prompt`.
        indices: of the examples to train on, from `filter_by_length`.
        sampler: which of them an epoch uses; it yields positions in `indices`.
        max_pixels: see `images.open_image`.
        cache: file of the examples' lengths, see `models.lengths.length_cache_path`.
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
        self._read: ReadFile = Path.read_bytes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> EncodedExample:
        if index < 0:
            return replace(self[~index], n_labels=0)
        example = self.examples[self.indices[index]]
        images = open_row_images(self.root, example, self.max_pixels, self._read)
        return self.processor.encode_train(render_prompt(example, self.templates), images, example.suffix)

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedExample]:
        """Return the rows of a micro-batch; DataLoader calls it. Not for several threads at the same time."""
        rows = [self.examples[self.indices[index if index >= 0 else ~index]] for index in indices]
        try:
            with read_ahead(self.root, rows) as self._read:
                return [self[index] for index in indices]
        finally:
            self._read = Path.read_bytes

    def lengths(self) -> list[tuple[int, int]]:
        """Return (tokens, answer tokens) of every row."""
        images = ImageFolder(self.root, self.max_pixels)
        return training_lengths(self.examples, self.indices, self.templates, self.processor, self.cache, images)

    def mean_tokens(self) -> float | None:
        """Return the mean tokens of a row; None if the rows have not been measured."""
        if self.cache is None or not self.cache.exists():
            return None
        tokens = np.load(self.cache, mmap_mode="r")[np.asarray(self.indices, dtype=np.int64)].sum(axis=1)
        return round(float(np.minimum(tokens, self.processor.max_length or tokens.max()).mean()), 1)


class MixtureSampler:
    """Chooses the rows of an epoch: of each dataset of a mixture, size times weight (rounded, at least one).

    Each dataset is passed over repeatedly, each pass in a new seeded order, and an epoch continues where the last one
    ended. So after any number of epochs the counts of two rows of a dataset differ by at most one. With weights of 1
    every row is used once per epoch.

    Args:
        sizes: number of rows of each dataset; row indices count through all datasets.
        weights: how often each row of a dataset is used per epoch, on average.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = sizes
        self.counts = [max(1, round(size * weight)) if size else 0 for size, weight in zip(sizes, weights, strict=True)]
        self.seed = seed

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(self, number: int) -> Tensor:
        """Return the row indices of an epoch, dataset after dataset: shape (len,), int64."""
        starts = accumulate(self.sizes[:-1], initial=0)
        return torch.cat([self._dataset_rows(dataset, number) + start for dataset, start in enumerate(starts)])

    def _dataset_rows(self, dataset: int, number: int) -> Tensor:
        """Return the rows of one dataset in an epoch, counted from 0 within the dataset."""
        size, count = self.sizes[dataset], self.counts[dataset]
        taken = [torch.empty(0, dtype=torch.int64)]
        start, end = number * count, (number + 1) * count
        while start < end:
            round_, first = divmod(start, size)
            last = min(size, first + end - start)
            whole = last - first == size  # the order does not matter: an epoch is shuffled
            taken.append(torch.arange(size) if whole else self._permutation(dataset, round_)[first:last])
            start += last - first
        return torch.cat(taken)

    def _permutation(self, dataset: int, round_: int) -> Tensor:
        """Return the order of a dataset's rows in one pass over it."""
        generator = torch.Generator().manual_seed(hash_text(f"{self.seed} {dataset} {round_}") >> 1)
        return torch.randperm(self.sizes[dataset], generator=generator)


class GlobalBatchSampler:
    """Batch sampler: shuffles each epoch by (seed, epoch) and splits effective batches into ranks and micro-batches.

    So the rows of an optimizer step do not depend on the number of ranks or the micro-batch size. The last effective
    batch of an epoch may be smaller. All ranks get the same number of micro-batches; a rank without rows left gets an
    unlabelled padding row (a negative index, see `SupervisedDataset`).

    Args:
        lengths: tokens of every row; if given, the rows of a step are sorted by length, the longest first.
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
        """Set the epoch of the next iteration."""
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
            mine = batch[self.rank :: self.world_size]  # so that every rank gets long and short rows
            for cut in range(0, math.ceil(len(batch) / self.world_size), self.micro_batch_size):
                yield mine[cut : cut + self.micro_batch_size] or [~batch[0]]

    def _sort_by_length(self, batch: list[int]) -> list[int]:
        lengths = self.lengths
        return batch if lengths is None else sorted(batch, key=lambda row: -lengths[row])


def num_micro_batches(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches into which each rank's share of `rows` is split."""
    return math.ceil(math.ceil(rows / world_size) / micro_batch_size)


# Checks before the first step: rows that are too long for the model, and images that its processor rejects.
#
# A row longer than the model's context is dropped, truncated or an error; it is always counted and reported.

_CHUNK = 1000
"""Images that are checked together."""


@dataclass(frozen=True)
class LengthFilterResult:
    """Which examples are trained on.

    Attributes:
        indices: of these examples, in order.
        limit: the maximum number of tokens of a row; None: no limit was checked.
        dropped, truncated: numbers of rows that were too long.
        unanswered: how many of the dropped rows have a prompt that leaves no room for an answer.
        messages: descriptions of the first rows that were too long.
        split: name of the split for messages.
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
        """Return the message for the user; empty if every row fits."""
        if not (self.dropped or self.truncated):
            return ""
        total = len(self.indices) + self.dropped
        fates = [(self.dropped, "dropped"), (self.truncated, "truncated")]
        shown = " and ".join(f"{count:,} {fate}" for count, fate in fates if count)
        filled = f" (the prompts of {self.unanswered:,} leave no room for an answer)" if self.unanswered else ""
        first = f"of {total:,} {self.split} rows, some are longer than {self.limit:,} tokens: {shown}"
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
    images: ImageFolder | None = None,
) -> LengthFilterResult:
    """Drop, truncate or reject rows that are longer than the model's maximum.

    A row whose whole answer would be cut off is dropped even with `truncate`: it would have no labels.

    Args:
        cache, images: of the rows' lengths, see `models.lengths.cached_token_lengths`.

    Raises:
        UserError: a row is too long, with `stop`; no row fits.
    """
    if processor.max_length is None:
        return LengthFilterResult(range(len(examples)), split=split)
    limit = processor.max_length
    lengths = cached_token_lengths(examples, templates, processor, cache, images)
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
        raise UserError(f"none of the {len(examples):,} {split} rows fits into {limit:,} tokens", faults[0])
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
    filled = f"; the prompt alone has {prompt:,}: no room for an answer" if prompt >= limit else ""
    return f"row {name}: {prompt + answer:,} tokens, the maximum is {limit:,}{filled}"


def images_of(rows: Iterable[Example]) -> dict[ImageFile, str]:
    """Image → the first row that uses it."""
    first: dict[ImageFile, str] = {}
    for row in rows:
        for file in row.image_files:
            first.setdefault(file, row.id)
    return first


def validate_images(
    images: Mapping[ImageFile, str], root: Path, processor: InputProcessor, max_pixels: int | None = None
) -> None:
    """Open images as in training, and run the model's processor on them.

    Args:
        images: see `images_of`.
        max_pixels: see `images.open_image`.

    Raises:
        UserError: images that cannot be used, each with its row.
    """
    faults = []

    def inspect(image: str, frame: int, digest: str) -> str:
        try:
            processor.encode_prompts([""], open_image(image_path(root, image), frame, digest, max_pixels))
        except UserError as error:
            return error.problem
        except Exception as error:  # a processor may raise anything
            if is_out_of_memory(error):
                raise
            return f"{image}: the model's processor rejects it: {error}"
        return ""

    shown = list(images)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, log.progress("images", len(shown)) as update:
        for start in range(0, len(shown), _CHUNK):
            chunk = shown[start : start + _CHUNK]
            for number, (one, problem) in enumerate(
                zip(chunk, pool.map(inspect, *zip(*chunk, strict=True)), strict=True)
            ):
                faults += [f"row {images[one]}: {problem}"] if problem else []
                update(start + number + 1, "")
    raise_all(faults, "Fix or remove them, then run `ftlib prepare CONFIG --again`.")
