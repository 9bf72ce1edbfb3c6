"""Model families by name, and what training and evaluation need of one; a plugin's is run when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ftlib.config.schema import Config, Model
from ftlib.core import registry
from ftlib.core.plugins import Plugin
from ftlib.core.registry import ModelEntry
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.hub.offline import offline
from ftlib.models.encoding import EncodedExample, Images, Size
from ftlib.models.libraries import quiet_libraries

NEVER_QUANTIZED = ("lm_head", "embed_out")
"""Heads: they lose too much. Regular expressions."""
_UNREGISTERED = ModelEntry("", "", "", "")


class InputProcessor(Protocol):
    """Turns prompts, images and answers into rows, and rows into batches.

    Attributes:
        pad_token_id, eos_token_id: token ids.
        stop_token_ids: the tokens that end an answer, `eos_token_id` among them.
        prefix_bidirectional: whether a prompt attends to itself both ways, or causally.
        length_depends_on_image: whether the number of an image's tokens depends on its size.
        takes_images: whether rows may have images.
        max_length: how many positions a row may have; None: more than any row needs.
        prefix_length: how many ids stand before every prompt's text (bos, image tokens).
        warning: what is told when training begins; empty for nothing.
    """

    pad_token_id: int
    eos_token_id: int
    prefix_bidirectional: bool
    length_depends_on_image: bool
    takes_images: bool
    max_length: int | None
    prefix_length: int
    warning: str

    @property
    def stop_token_ids(self) -> set[int]: ...

    def encode_train(self, prompt: str, image: Images, answer: str) -> EncodedExample:
        """A row to learn from."""

    def encode_prompts(self, prompts: Sequence[str], image: Images) -> list[EncodedExample]:
        """Rows to be answered about one image, about several, or about none."""

    def encode_answer(self, answer: str) -> list[int]:
        """An answer and its end."""

    def token_lengths(
        self, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Size]] | None = None
    ) -> list[tuple[int, int]]:
        """Tokens of every prompt and of every answer with its end.

        Args:
            images: the sizes of every row's images, where `takes_images`; (0, 0) unless `length_depends_on_image`.
                None: every row has as many as usual in the family, one or none.
        """

    def collate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Rows to learn from, stacked: the model's arguments and labels."""

    def collate_generate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Questions as transformers' own generation takes them: input_ids, attention_mask and the family's own."""

    def embed_prompts(self, model: torch.nn.Module, rows: Sequence[EncodedExample]) -> dict[str, Any]:
        """Questions on the model's device, padded on the left, as the model's first forward pass takes them.

        Returns:
            inputs_embeds or input_ids, attention_mask, position_ids: shape (…, rows, longest); next_position: of the
            answer's first token, shape (rows, 1), no argument of the model; and the family's own arguments.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids → text."""

    def save(self, folder: Path) -> None:
        """Write tokenizer and processor beside weights."""


class ImageInputProcessor(InputProcessor, Protocol):
    """What sharded training needs, too, where rows may have images."""

    def add_blank_image(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of text, on the model's device, with an image that changes neither loss nor gradients."""


@dataclass(frozen=True)
class ModelFamily:
    """A model family.

    Attributes:
        load_processor: (model folder, config) → inputs.
        module_group: (model, parameter's name) → the part of the model that it belongs to.
        local_attention: whether layers that attend locally do so, or to everything, see `attention.py`.
        final_softcap: whether a cap on the final logits is usual, where the checkpoint has one.
        never_quantized: regular expressions for modules that quantization leaves as they are.
        entry: its name and what else is known of it without importing it; `model_family` sets it.
    """

    load_processor: Callable[[Path, Config], InputProcessor]
    module_group: Callable[[torch.nn.Module, str], str]
    local_attention: bool = True
    final_softcap: bool = True
    never_quantized: Sequence[str] = NEVER_QUANTIZED
    entry: ModelEntry = _UNREGISTERED

    @property
    def model_class(self) -> Any:
        """The class of transformers that loads its weights."""
        import transformers

        return getattr(transformers, self.entry.model_class)

    @property
    def images(self) -> bool:
        """Whether its rows may have images."""
        return self.entry.images


def model_family(name: str, plugins: Sequence[Plugin] = ()) -> ModelFamily:
    """A model family by its name.

    Raises:
        UserError: there is none, its plugin cannot be used, or transformers lacks its class.
    """
    import transformers

    quiet_libraries()
    entry, function = registry.load("model", name, plugins)
    if not hasattr(transformers, entry.model_class):
        raise UserError(f"model family {name}: transformers {transformers.__version__} has no {entry.model_class}")
    family = registry.made(function, ModelFamily, f"model family {name}")
    return replace(family, entry=entry, load_processor=offline()(family.load_processor))


def family_of(model: Model) -> ModelFamily:
    """The family of a config's model; see `model_family`."""
    return model_family(model.family, model.plugins)


def validate_image_columns(model: Model, rows: Sequence[Example]) -> None:
    """Refuse rows with an image where the family reads text only.

    Raises:
        UserError: the first row that does not fit.
    """
    if model.entry.images:
        return
    for row in rows:
        if row.image:
            problem = f"row {row.id} has an image ({row.image}), but model.family {model.family} reads text only"
            raise UserError(problem)
