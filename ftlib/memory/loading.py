"""How many CPU cores load rows as fast as a GPU trains on them: some rows are loaded here and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.config.schema import Config
from ftlib.data.example import Example
from ftlib.data.images import open_row_images
from ftlib.data.prompts import render_prompt
from ftlib.models.registry import InputProcessor

FAST_GPU_FLOPS = 400e12
"""Model FLOP/s that are assumed of a GPU: LoRA in bfloat16 on an H100 or H200, 40 % of its peak. A slower GPU needs
fewer cores."""

SMALLEST_ROW = 1e11
"""FLOP of a row from which on that is assumed: smaller models do not use a GPU that well."""

_ROWS = 32
_SECONDS = 2.0
"""How many rows are timed at most, and how long: large photos take a quarter of a second each."""


@dataclass(frozen=True)
class LoadingEstimate:
    """What loading rows costs, and how fast it must be.

    Attributes:
        row_seconds: CPU time of one core of this machine to open, encode and collate a row, on average.
        timed: number of rows that were timed.
        rows_per_second: of one GPU at `FAST_GPU_FLOPS`, for rows of the timed rows' mean length.
    """

    row_seconds: float
    timed: int
    rows_per_second: float

    @property
    def cores(self) -> int:
        """Cores for each GPU that only load rows."""
        return max(1, math.ceil(self.row_seconds * self.rows_per_second))

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "assumed_flops": FAST_GPU_FLOPS, "cores_per_gpu": self.cores}


def measure_loading(
    config: Config, rows: Sequence[Example], root: Path, inputs: InputProcessor, flops_per_token: float
) -> LoadingEstimate:
    """Load some rows, evenly spread over a split, as training does.

    Args:
        root: the folder to which image paths are relative.
        flops_per_token: of a training step.

    Raises:
        UserError: an image cannot be opened or is rejected by the model's processor.
    """
    chosen = np.unique(np.linspace(0, len(rows) - 1, _ROWS + 1).astype(int)).tolist()
    tokens: list[int] = []
    started = time.process_time()
    for number, index in enumerate(chosen):
        row = rows[index]
        images = open_row_images(root, row, config.data.max_pixels)
        encoded = inputs.encode_train(render_prompt(row, config.data.templates), images, row.suffix)
        inputs.collate([encoded])
        if number == 0 and len(chosen) > 1:  # it loads codecs, too
            started = time.process_time()
            continue
        tokens.append(len(encoded.input_ids))
        if time.process_time() - started > _SECONDS:
            break
    seconds = (time.process_time() - started) / len(tokens)
    speed = FAST_GPU_FLOPS / (flops_per_token * sum(tokens) / len(tokens))
    return LoadingEstimate(seconds, len(tokens), speed)
