"""Model families by name, and what training and evaluation need of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.errors import UserError
from ftlib.models import causal, paligemma
from ftlib.models.rows import Row


class Inputs(Protocol):
    """Turns prompts, images and answers into rows, and rows into batches.

    Attributes:
        pad_id, eos_id: token ids.
        end_ids: the tokens that end an answer, `eos_id` among them.
        both_ways: whether a prompt attends to itself both ways, or causally.
        first_position: what positions count from.
        limit: how many positions a row may have; None: more than any row needs.
        start: how many ids stand before every prompt's text (bos, image tokens).
        remark: what is told when training begins; empty for nothing.
    """

    pad_id: int
    eos_id: int
    both_ways: bool
    first_position: int
    limit: int | None
    start: int
    remark: str

    @property
    def end_ids(self) -> set[int]: ...

    def train_row(self, prompt: str, image: Image.Image | None, answer: str) -> Row:
        """A row to learn from."""

    def prompt_rows(self, prompts: Sequence[str], image: Image.Image | None) -> list[Row]:
        """Rows to be answered about one image, or about none."""

    def answer_ids(self, answer: str) -> list[int]:
        """An answer and its end."""

    def lengths(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[int, int]]:
        """Tokens of every prompt and of every answer with its end."""

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows to learn from, stacked: the model's arguments and labels."""

    def question_batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Questions as transformers' own generation takes them: input_ids, attention_mask and the family's own."""

    def prompt_batch(self, model: torch.nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Questions on the model's device, padded on the left: inputs_embeds, attention_mask and the family's own."""

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids → text."""

    def save(self, folder: Path) -> None:
        """Write tokenizer and processor beside weights."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_class: transformers' class that loads its weights.
        load_inputs: (model folder, config) → inputs.
        part: (model, parameter's name) → the part of the model that it belongs to.
        images: whether its rows have images; they must, or must not.
        local_attention: whether layers that attend locally do so, or to everything, see `attention.py`.
        final_softcap: whether a cap on the final logits is usual, where the checkpoint has one.
    """

    model_class: Any
    load_inputs: Callable[[Path, Config], Inputs]
    part: Callable[[torch.nn.Module, str], str]
    images: bool
    local_attention: bool
    final_softcap: bool


FAMILIES: dict[str, Family] = {
    "paligemma": Family(
        paligemma.MODEL_CLASS,
        lambda folder, config: paligemma.PaliGemmaInputs.load(folder, config.model.max_length),
        paligemma.part,
        images=True,
        local_attention=False,
        final_softcap=False,
    ),
    "causal": Family(
        causal.MODEL_CLASS,
        lambda folder, config: causal.CausalInputs.load(
            folder,
            max_length=config.model.max_length,
            chat=config.data.prompt == CHAT,
            labels_on=config.loss.on,
            packing=config.loss.packing,
            chat_template_arguments=config.model.chat_template_arguments,
        ),
        causal.part,
        images=False,
        local_attention=True,
        final_softcap=True,
    ),
}


def check_images(family: str, rows: Sequence[Example]) -> None:
    """Refuse rows without an image where the family looks at one, and rows with one where it does not.

    Raises:
        UserError: the first row that does not fit.
    """
    images = FAMILIES[family].images
    for row in rows:
        if bool(row.image) != images:
            has = "has no image" if images else f"has an image ({row.image})"
            wants = "looks at an image in every row" if images else "reads text only"
            raise UserError(f"row {row.id} {has}, but model.family {family} {wants}")
