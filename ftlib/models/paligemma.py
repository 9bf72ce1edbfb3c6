"""PaliGemma: how a row is encoded, for training and for generation.

A row is `[<image> × N] <bos> prompt "\\n" answer <eos>` (big_vision, configs/proj/paligemma). The tokens of several
images (NLVR2, frames of a video) stand one behind the other, and a row without images begins with `<bos>`. Images and
prompt attend to each other both ways (token type 0), the answer is causal (token type 1), only answer and `<eos>` carry
labels.
Rows are padded on the left, so that all labels of a batch stand in its last columns and the 257,152-wide head needs to
be computed only there. Checkpoints of PaliGemma's authors (`.npz`) are converted in big_vision.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaModel, PaliGemmaProcessor

from ftlib.core.registry import register_model
from ftlib.errors import UserError
from ftlib.hub.cache import require_model
from ftlib.models.custom_code import load_error_message, load_error_remedy
from ftlib.models.encoding import (
    EncodedExample,
    Images,
    Size,
    as_images,
    join_image_inputs,
    look_up,
    model_inputs,
    pad_left,
    position_ids,
)
from ftlib.models.libraries import quiet_libraries
from ftlib.models.registry import NEVER_QUANTIZED, ModelFamily

PARTS = {
    "vision": "vision_tower",
    "projector": "multi_modal_projector",
    "embeddings": "embed_tokens",
    "language": "language_model",
}
"""Part → the word in its modules' names."""


class PaliGemmaInputProcessor:
    """Turns prompts, images and answers into rows, and rows into batches, as a model's own processor defines them."""

    prefix_bidirectional = True
    length_depends_on_image = False
    takes_images = True
    warning = ""

    def __init__(self, processor: PaliGemmaProcessor, max_length: int | None = None) -> None:
        """
        Args:
            max_length: positions that a row may have, image tokens included.
        """
        self.processor = processor
        self.max_length = max_length
        self.tokenizer = processor.tokenizer
        images = processor.image_processor
        self._size = (images.size["width"], images.size["height"])
        self._resample = images.resample
        mean, std = (np.asarray(one, dtype=np.float32)[:, None] for one in (images.image_mean, images.image_std))
        self._values = torch.from_numpy((np.arange(256, dtype=np.float32) / 255.0 - mean) / std)
        """What the model sees of every level of a channel: shape (3, 256), float32."""
        self._image_ids = [processor.image_token_id] * processor.image_seq_length
        self._newline = self._text_ids("\n")
        self.prefix_length = len(self._image_ids) + 1
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self.eos_token_id: int = self.tokenizer.eos_token_id

    @classmethod
    def load(
        cls, folder: Path, max_length: int | None = None, resize: Literal["processor", "bilinear"] = "processor"
    ) -> PaliGemmaInputProcessor:
        """Read the processor of a model folder.

        Args:
            max_length: fewer positions than the model has; image tokens count.
            resize: see `config.Model`.

        Raises:
            UserError: the folder has no PaliGemma processor.
        """
        quiet_libraries()
        require_model(folder)
        remedy = "The folder needs processor_config.json (or preprocessor_config.json) and the tokenizer's files."
        try:
            config = PaliGemmaConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            limits = [limit for limit in (max_length, config.text_config.max_position_embeddings) if limit]
            processor = PaliGemmaProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if resize == "bilinear":
                processor.image_processor.resample = Image.Resampling.BILINEAR  # which is saved with a result, too
            inputs = cls(processor, min(limits, default=None))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{folder}: no PaliGemma processor can be read from it: {load_error_message(error, folder)}"
            raise UserError(problem, load_error_remedy(error, remedy)) from None
        if fault := inputs._misfit(config):
            raise UserError(f"{folder}: processor and model do not belong together: {fault}", remedy)
        return inputs

    def _misfit(self, config: PaliGemmaConfig) -> str | None:
        """Without its files transformers builds a default tokenizer; then the ids do not agree with the model's."""
        vision = config.vision_config
        pairs = {
            "the id of <image>": (self.processor.image_token_id, config.image_token_id),
            "image tokens": (len(self._image_ids), (vision.image_size // vision.patch_size) ** 2),
            "image width": (self._size[0], vision.image_size),
        }
        for what, (ours, models) in pairs.items():
            if ours != models:
                return f"{what}: {ours} in the processor, {models} in the model"
        return None

    @property
    def stop_token_ids(self) -> set[int]:
        """What ends an answer."""
        return {self.eos_token_id}

    def encode_train(self, prompt: str, image: Images, answer: str) -> EncodedExample:
        """A row to learn from: prompt, answer and `<eos>`; what goes beyond the limit is cut off at its end."""
        (asked,) = self.encode_prompts([prompt], image)
        ids = [*asked.input_ids, *self.encode_answer(answer)][: self.max_length]
        return replace(asked, input_ids=ids, n_labels=len(ids) - len(asked.input_ids))

    def encode_prompts(self, prompts: Sequence[str], image: Images) -> list[EncodedExample]:
        """Rows to be answered about the same images, each exactly a training row before its answer; they share the
        pixels."""
        images = as_images(image)
        image_inputs, kept = self._image_inputs(images), len(self._image_ids) * len(images) + 1
        return [
            EncodedExample(self._prompt_ids(prompt, len(images)), 0, image_inputs, n_kept=kept) for prompt in prompts
        ]

    def encode_answer(self, answer: str) -> list[int]:
        """An answer and `<eos>`."""
        return [*self._text_ids(answer), self.eos_token_id]

    def token_lengths(
        self, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Size]] | None = None
    ) -> list[tuple[int, int]]:
        """Tokens of every prompt, image tokens included, and of every answer with its `<eos>`."""
        counts = [1] * len(prompts) if images is None else list(map(len, images))
        texts = [[prompt.rstrip("\n") for prompt in prompts], list(answers)]
        ids = [self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
        around = 1 + len(self._newline)
        return [
            (count * len(self._image_ids) + around + len(prompt), len(answer) + 1)
            for count, prompt, answer in zip(counts, *ids, strict=True)
        ]

    def collate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Pad rows on the left and stack them.

        Returns:
            input_ids, attention_mask, token_type_ids, position_ids, labels: shape (rows, longest), int64; pixel_values
            of all images of all rows: shape (images, 3, size, size), uint8, with their values (`encoding.LOOKUP`);
            missing without images; how many images each row has (`encoding.PER_ROW`).
        """
        return {**self._text_batch(rows), **join_image_inputs(rows)}

    def add_blank_image(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of text with an image for which no token stands: its features go nowhere, their gradients are
        zero."""
        width, height = self._size
        return {**batch, "pixel_values": torch.zeros(1, 3, height, width, device=batch["input_ids"].device)}

    def collate_generate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The model's arguments of `collate`, without positions."""
        arguments = model_inputs(self.collate(rows))
        return {name: tensor for name, tensor in arguments.items() if name not in ("use_cache", "position_ids")}

    def embed_prompts(self, model: torch.nn.Module, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """A batch of questions on the model's device; every image goes through the vision tower once.

        Rows share an image if they hold the same object, as `encode_prompts` makes them.

        Returns:
            inputs_embeds: shape (rows, longest, hidden); attention_mask, token_type_ids, position_ids: shape (rows,
            longest); next_position: shape (rows, 1).
        """
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self._text_batch(rows).items() if name != "labels"}
        distinct = {id(row.image_inputs): row for row in rows}
        indices = {key: index for index, key in enumerate(distinct)}
        counts = [len(row.image_inputs.get("pixel_values", ())) for row in distinct.values()]
        ids = batch.pop("input_ids")
        slots = ids == self.processor.image_token_id  # which has no row in the authors' own table
        embedded = model.get_input_embeddings()(ids.masked_fill(slots, self.pad_token_id))  # type: ignore[operator]
        if any(counts):
            joined = join_image_inputs(list(distinct.values()))
            pixels = look_up({name: tensor.to(device) for name, tensor in joined.items()})["pixel_values"]
            found = model.get_image_features(pixels).pooler_output.split(counts)  # type: ignore[operator]
            features = torch.cat([found[indices[id(row.image_inputs)]] for row in rows])
            embedded = embedded.masked_scatter(slots.unsqueeze(-1), features.to(embedded.dtype))
        return {"inputs_embeds": embedded, **batch, "next_position": batch["position_ids"][:, -1:] + 1}

    def _text_batch(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        batch = pad_left(rows, self.pad_token_id)
        types = torch.zeros_like(batch["input_ids"])
        for index, row in enumerate(rows):
            types[index, types.shape[1] - row.n_labels :] = 1
        return {**batch, "token_type_ids": types, "position_ids": position_ids(batch["attention_mask"], first=1)}

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids → text, without special tokens (`<loc>` and `<seg>` are text)."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """Write the processor."""
        self.processor.save_pretrained(folder)

    def save_image_processor(self, folder: Path) -> None:
        """Write only what says how images are resized."""
        self.processor.image_processor.save_pretrained(folder)

    def _prompt_ids(self, prompt: str, images: int) -> list[int]:
        """The newline is tokenized apart, as the authors do, so that it can never merge with the prompt's end."""
        return [
            *self._image_ids * images,
            self.tokenizer.bos_token_id,
            *self._text_ids(prompt.rstrip("\n")),
            *self._newline,
        ]

    def _text_ids(self, text: str) -> list[int]:
        """Special tokens written out in user text (`<image>`, `<eos>`) stay text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Stretch to the square, always through Pillow: the same pixels with and without torchvision.

        Channels stay last in memory until `encoding.look_up`, so that the device moves them.
        """
        if not images:
            return {}
        levels = np.empty((len(images), *self._size[::-1], 3), dtype=np.uint8)
        for index, image in enumerate(images):
            levels[index] = image.resize(self._size, Image.Resampling(self._resample))
        return {"pixel_values": torch.from_numpy(levels).permute(0, 3, 1, 2), "pixel_values_lookup": self._values}


def skip_image_token_count(model: torch.nn.Module) -> None:
    """Skip transformers' count of image tokens, for which the CPU waits for the GPU in every batch.

    Rows are made here, with exactly as many as the model's images have (`PaliGemmaInputProcessor.load` compares them).
    A model of another family stays as it is.
    """
    for module in model.modules():
        if isinstance(module, PaliGemmaModel):
            module.get_placeholder_mask = partial(_image_slots, module.config.image_token_id)


def _image_slots(image_id: int, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    """Where image features go: shape (rows, length, 1), bool."""
    return (input_ids == image_id).unsqueeze(-1)


def module_group(model: torch.nn.Module, name: str) -> str:
    """The part that a parameter belongs to; the (tied) head counts as embeddings."""
    if "lm_head" in name or PARTS["embeddings"] in name:
        return "embeddings"
    return next(part for part in ("vision", "projector", "language") if PARTS[part] in name)


@register_model(name="paligemma")
def make_family() -> ModelFamily:
    return ModelFamily(
        lambda folder, config: PaliGemmaInputProcessor.load(folder, config.model.max_length, config.model.resize),
        module_group,
        local_attention=False,
        final_softcap=False,
        never_quantized=(  # SigLIP loses too much
            ".*vision_tower",
            ".*multi_modal_projector",
            *NEVER_QUANTIZED,
        ),
    )
