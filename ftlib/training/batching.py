"""Which rows go into which batch, and rows from disk to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ftlib.data.examples import Example
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import prompt_of
from ftlib.models.families import Inputs
from ftlib.models.rows import Row
from ftlib.training.lengths import row_lengths


class TrainingRows(Dataset[Row]):
    """A split as encoded rows; images are opened when a row is asked for.

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
        example = self.examples[self.kept[index]]
        image = open_image(image_path(self.root, example.image), example.frame) if example.image else None
        return self.inputs.train_row(prompt_of(example, self.template), image, example.suffix)

    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, of them answer) of every row; all are tokenized."""
        return row_lengths(self.examples, self.kept, self.template, self.inputs)


class EffectiveBatches:
    """Batch sampler: shuffles each epoch by (seed, epoch) and cuts whole effective batches into micro-batches.

    The rows that an optimizer step sees therefore do not depend on how they are cut. The last effective batch of an
    epoch may be smaller.

    Args:
        lengths: tokens of every row; rows of a step are then cut by length, the longest first.
    """

    def __init__(
        self, rows: int, effective: int, micro: int, seed: int, drop_last: bool, lengths: Sequence[int] | None = None
    ) -> None:
        self.rows = rows - rows % effective if drop_last else rows
        self.total = rows
        self.effective = effective
        self.micro = micro
        self.seed = seed
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.effective)
        return whole * -(-self.effective // self.micro) + -(-rest // self.micro)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.total, generator=generator)[: self.rows].tolist()
        for start in range(0, self.rows, self.effective):
            batch = self._by_length(order[start : start + self.effective])
            for cut in range(0, len(batch), self.micro):
                yield batch[cut : cut + self.micro]

    def _by_length(self, batch: list[int]) -> list[int]:
        lengths = self.lengths
        return batch if lengths is None else sorted(batch, key=lambda row: -lengths[row])
