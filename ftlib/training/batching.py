"""Which rows go into which batch, and rows from disk to tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ftlib.data.examples import Example
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import prompt_of
from ftlib.models.families import Inputs
from ftlib.models.rows import Row


class TrainingRows(Dataset[Row]):
    """A split as encoded rows; images are opened when a row is asked for. Place `~n` is row n without its labels.

    Args:
        kept: the places of the examples to learn from, as `fitting.fit_rows` finds them.
    """

    def __init__(
        self, examples: Sequence[Example], root: Path, template: str, inputs: Inputs, kept: Sequence[int]
    ) -> None:
        self.examples = examples
        self.root = root
        self.template = template
        self.inputs = inputs
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Row:
        if index < 0:
            return replace(self[~index], n_answer=0)
        example = self.examples[self.kept[index]]
        image = open_image(image_path(self.root, example.image), example.frame) if example.image else None
        return self.inputs.train_row(prompt_of(example, self.template), image, example.suffix)


class EffectiveBatches:
    """Batch sampler: shuffles each epoch by (seed, epoch) and cuts whole effective batches for ranks and micro-batches.

    The rows that an optimizer step sees therefore do not depend on how they are cut. The last effective batch of an
    epoch may be smaller. All ranks get equally many micro-batches; one whose rows have run out gets a row without
    labels (a negative place, see `TrainingRows`).
    """

    def __init__(
        self, rows: int, effective: int, micro: int, seed: int, drop_last: bool, rank: int = 0, world: int = 1
    ) -> None:
        self.rows = rows - rows % effective if drop_last else rows
        self.total = rows
        self.effective = effective
        self.micro = micro
        self.seed = seed
        self.rank = rank
        self.world = world
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
        order = torch.randperm(self.total, generator=generator)[: self.rows].tolist()
        for start in range(0, self.rows, self.effective):
            batch = order[start : start + self.effective]
            share = math.ceil(len(batch) / self.world)
            mine = batch[self.rank * share : (self.rank + 1) * share]
            for cut in range(0, share, self.micro):
                yield mine[cut : cut + self.micro] or [~batch[0]]


def micro_batches(rows: int, micro: int, world: int) -> int:
    """Into how many micro-batches each rank's share of so many rows is cut."""
    return math.ceil(math.ceil(rows / world) / micro)
