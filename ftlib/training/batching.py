"""Which rows go into which batch, and rows from disk to tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftlib.data.examples import Example
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import Templates, prompt_of
from ftlib.data.splits import hash_text
from ftlib.models.families import Inputs
from ftlib.models.rows import Row
from ftlib.training.lengths import row_lengths


class TrainingRows(Dataset[Row]):
    """A split as encoded rows; images are opened when a row is asked for. Place `~n` is row n without its labels.

    Args:
        templates: the prompts, see `prompts.prompt_of`.
        kept: the places of the examples to learn from, as `fitting.fit_rows` finds them.
        draw: which of them an epoch sees, by their number in `kept`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        root: Path,
        templates: Templates,
        inputs: Inputs,
        kept: Sequence[int],
        draw: Draw,
    ) -> None:
        self.examples = examples
        self.root = root
        self.templates = templates
        self.inputs = inputs
        self.kept = kept
        self.draw = draw

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Row:
        if index < 0:
            return replace(self[~index], n_answer=0)
        example = self.examples[self.kept[index]]
        image = open_image(image_path(self.root, example.image), example.frame) if example.image else None
        return self.inputs.train_row(prompt_of(example, self.templates), image, example.suffix)

    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, of them answer) of every row; all are tokenized."""
        return row_lengths(self.examples, self.kept, self.templates, self.inputs)


class Draw:
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
        return torch.cat([self._of(place, number) + start for place, start in enumerate(starts)])

    def _of(self, place: int, number: int) -> Tensor:
        """The rows of one dataset in an epoch, from 0."""
        size, count = self.sizes[place], self.counts[place]
        taken = [torch.empty(0, dtype=torch.int64)]
        start, end = number * count, (number + 1) * count
        while start < end:
            round_, first = divmod(start, size)
            last = min(size, first + end - start)
            whole = last - first == size  # in which order does not matter: an epoch is shuffled
            taken.append(torch.arange(size) if whole else self._order(place, round_)[first:last])
            start += last - first
        return torch.cat(taken)

    def _order(self, place: int, round_: int) -> Tensor:
        """A dataset's rows in the order in which they are gone through this time."""
        generator = torch.Generator().manual_seed(hash_text(f"{self.seed} {place} {round_}") >> 1)
        return torch.randperm(self.sizes[place], generator=generator)


class EffectiveBatches:
    """Batch sampler: shuffles each epoch by (seed, epoch) and cuts whole effective batches for ranks and micro-batches.

    The rows that an optimizer step sees therefore do not depend on how they are cut. The last effective batch of an
    epoch may be smaller. All ranks get equally many micro-batches; one whose rows have run out gets a row without
    labels (a negative place, see `TrainingRows`).

    Args:
        lengths: tokens of every row; rows of a step are then cut by length, the longest first.
    """

    def __init__(
        self,
        draw: Draw,
        effective: int,
        micro: int,
        seed: int,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.draw = draw
        self.rows = len(draw) - len(draw) % effective if drop_last else len(draw)
        self.effective = effective
        self.micro = micro
        self.seed = seed
        self.rank = rank
        self.world = world
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.effective)
        cuts = [micro_batches(batch, self.micro, self.world) for batch in (self.effective, rest)]
        return whole * cuts[0] + cuts[1]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = self.draw.epoch(self.epoch)
        order = drawn[torch.randperm(len(drawn), generator=generator)[: self.rows]].tolist()
        for start in range(0, self.rows, self.effective):
            batch = self._by_length(order[start : start + self.effective])
            mine = batch[self.rank :: self.world]  # so that every rank gets long ones and short ones
            for cut in range(0, math.ceil(len(batch) / self.world), self.micro):
                yield mine[cut : cut + self.micro] or [~batch[0]]

    def _by_length(self, batch: list[int]) -> list[int]:
        lengths = self.lengths
        return batch if lengths is None else sorted(batch, key=lambda row: -lengths[row])


def micro_batches(rows: int, micro: int, world: int) -> int:
    """Into how many micro-batches each rank's share of so many rows is cut."""
    return math.ceil(math.ceil(rows / world) / micro)
