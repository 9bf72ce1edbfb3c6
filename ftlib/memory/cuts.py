"""How an effective batch is cut into micro-batches so that a step fits a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ftlib.config import Config
from ftlib.data.prepared import open_prepared
from ftlib.data.prompts import prompt_of
from ftlib.errors import UserError
from ftlib.memory.need import Need, Rows, need
from ftlib.models.families import FAMILIES
from ftlib.runs import Run
from ftlib.site import Site

ASSUMED_TEXT, ASSUMED_ANSWER = 96, 32
"""Tokens of prompt and answer, and of the answer, where no prepared data tells."""

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Cut:
    """A way to compute an optimizer step.

    Attributes:
        micro_batch: rows at once.
        checkpointing: gradient checkpointing.
        need: what it needs.
    """

    micro_batch: int
    checkpointing: bool
    need: Need

    def applied(self, config: Config) -> Config:
        """The config with this cut; its effective batch stays."""
        training = {
            **config.training,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": config.rows_per_gpu // self.micro_batch,
            "gradient_checkpointing": self.checkpointing,
        }
        return config.model_copy(update={"training": training})


def parse_size(text: str) -> int:
    """Bytes of a size such as 12GiB, 12G or 800M; units are powers of 1024, as GPU memory is sold.

    Raises:
        UserError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"{text}: not a size", "Write it as in 12GiB.")
    size = int(float(match[1]) * 2 ** (_UNITS[match[2].upper()] if match[2] else 0))
    if size < 1 << 20:
        raise UserError(f"{text}: no GPU is that small", "Write it as in 12GiB.")
    return size


def gpu_bytes() -> int | None:
    """Memory of this process's GPU; None: there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def longest_rows(
    config: Config, site: Site, folder: Path, model: torch.nn.Module, run: Run | None = None
) -> tuple[Rows, bool]:
    """The longest training rows, and whether they were found in prepared data.

    Without it PaliGemma's rows are taken to be the image, 64 tokens of prompt and 32 of answer; a causal model's rows
    fill all its positions (or `model.max_length`).
    """
    try:
        prepared = open_prepared(config, site, run)
    except UserError:
        return _assumed(config, model), False
    inputs = FAMILIES[config.model.family].load_inputs(folder, config)
    examples = prepared.rows("train")
    texts = [prompt_of(row, config.data.templates) for row in examples]
    lengths = inputs.lengths(texts, [row.suffix for row in examples])
    return _longest(config, lengths, inputs.limit), True


def _longest(config: Config, lengths: Sequence[tuple[int, int]], limit: int | None) -> Rows:
    """Longer rows than `limit` are cut there or left out."""
    most = limit or max(prompt + answer for prompt, answer in lengths)
    if config.model.too_long != "truncate":
        lengths = [pair for pair in lengths if sum(pair) <= most]
    if not lengths:
        raise UserError(f"none of the training rows fits into {most:,} tokens")
    tokens = min(most, max(prompt + answer for prompt, answer in lengths))
    answer = tokens if config.loss.on == "everything" else max(answer for _, answer in lengths)
    return Rows(tokens, min(answer, tokens - 1))


def _assumed(config: Config, model: torch.nn.Module) -> Rows:
    shapes = model.config
    vision = getattr(shapes, "vision_config", None)
    if vision is None:
        positions = shapes.get_text_config().max_position_embeddings  # type: ignore[union-attr, operator]
        tokens = min(config.model.max_length or positions, positions)
        return Rows(tokens, tokens - 1)
    images = (vision.image_size // vision.patch_size) ** 2
    tokens = min(images + ASSUMED_TEXT, config.model.max_length or images + ASSUMED_TEXT)
    return Rows(tokens, min(ASSUMED_ANSWER, tokens - images))


def largest_cut(
    model: torch.nn.Module, config: Config, rows: Rows, capacity: int, checkpointing: bool, at_most: int | None = None
) -> Cut | None:
    """The cut with the largest micro-batch that fits; None: not even a single row does.

    Micro-batches divide a GPU's share of the effective batch, so that it stays what it is.

    Args:
        capacity: bytes of the GPU.
        at_most: no larger micro-batch.
    """
    share = config.rows_per_gpu
    sizes = [size for size in range(1, min(share, at_most or share) + 1) if share % size == 0]
    best, low, high = None, 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        found = need(model, config, rows, sizes[middle], checkpointing)
        if found.total <= capacity:
            best, low = Cut(sizes[middle], checkpointing, found), middle + 1
        else:
            high = middle
    return best


def choose_cut(model: torch.nn.Module, config: Config, rows: Rows, capacity: int, at_most: int | None = None) -> Cut:
    """The largest micro-batch that fits, with gradient checkpointing only if nothing fits without.

    `training.gradient_checkpointing` in the config decides that question itself.

    Raises:
        UserError: not even a single row fits.
    """
    wanted = config.training.get("gradient_checkpointing")
    for checkpointing in (False, True) if wanted is None else (bool(wanted),):
        if found := largest_cut(model, config, rows, capacity, checkpointing, at_most):
            return found
    least = need(model, config, rows, 1, wanted is not False)
    problem = f"one row of {rows.tokens:,} tokens needs {gib(least.total)} of GPU memory, there are {gib(capacity)}"
    raise UserError(problem, "Try model.quantization: nf4, a smaller image size, or a shorter model.max_length.")


def gib(size: int) -> str:
    """A size in GiB."""
    return f"{size / 2**30:.2f} GiB"
