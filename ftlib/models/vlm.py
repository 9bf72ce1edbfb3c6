"""Vision-language models with a chat template: Qwen-VL, Gemma 3 and 4, SmolVLM, InternVL and their kin, by one recipe.

A row is what the chat template asks with (image and prompt in a user's turn), and behind it what the template writes
for an answer, up to the token that ends the turn; see chat.py. Only the answer and that token carry labels: no model
masks the tokens of its images itself. Prompt and answer are tokenized apart, so that a question is exactly a training
row before its answer.

The model's own processor encodes every image. The text that it puts in an image's place depends on the image's size
alone, so that it is known for a size from a blank picture (`_image_text`); whether rows made of it are the processor's
own is checked when the processor is loaded. Images always go through Pillow where the processor can: which pixels a
model sees does not depend on torchvision being installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig

from ftlib.config.schema import CHAT, Config
from ftlib.core.registry import register_model
from ftlib.errors import UserError
from ftlib.hub.cache import require_model
from ftlib.models.chat import ChatTemplate, count_images, encode_conversation
from ftlib.models.custom_code import load_error_message, load_error_remedy
from ftlib.models.encoding import (
    EncodedExample,
    Images,
    Size,
    append_rows,
    as_images,
    join_image_inputs,
    model_inputs,
    pad_left,
    position_ids,
)
from ftlib.models.libraries import quiet_libraries
from ftlib.models.registry import NEVER_QUANTIZED, ModelFamily

_TYPE_IDS = ("mm_token_type_ids", "token_type_ids")
"""Arguments with one number for each token, 1 at an image's; without them positions or masks are silently others."""

_PROBE_SIZES = ((61, 40), (40, 97))
_SIZES_KEPT = 1024
"""Of images, with the text that stands for each: 15,000 tokens for a photo of 12 megapixels in Qwen2.5-VL."""
_REMEDY = (
    "The folder needs processor_config.json or preprocessor_config.json, a chat template and the tokenizer's files."
)


class VisionLanguageProcessor:
    """Turns prompts, images and answers into rows, and rows into batches, as a model's own processor defines them."""

    prefix_bidirectional = False
    length_depends_on_image = True
    takes_images = True
    prefix_length = 0

    def __init__(
        self,
        processor: Any,
        config: PreTrainedConfig,
        max_length: int | None = None,
        conversations: bool = False,
        chat_template_arguments: Mapping[str, Any] | None = None,
        image_arguments: Mapping[str, Any] | None = None,
        all_turns: bool = False,
    ) -> None:
        """
        Args:
            processor: of transformers.
            config: of the model.
            max_length: positions that a row may have, image tokens included.
            conversations: prompts are conversations (JSON); otherwise each is the text of one turn.
            chat_template_arguments: see `chat.ChatTemplate`.
            image_arguments: of the processor's call, such as `max_pixels`.
            all_turns: all answers of a conversation carry loss, not only the last, see `chat.encode_conversation`.

        Raises:
            UserError: no chat template, or one that will not do; arguments that the image processor does not have;
                rows made here would not be the processor's own.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self._conversations = conversations
        self._all_turns = all_turns
        self._image_arguments = dict(image_arguments or {})
        numbers = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        image_id = next((number for number in numbers if number is not None), None)
        if image_id is None:
            raise UserError(f"the config of {config.model_type} names no image token (image_token_id)")
        self._image_id: int = image_id
        self._placeholder: str = processor.image_token
        template = processor.chat_template or self.tokenizer.chat_template
        if not isinstance(template, str):
            raise UserError(
                f"its processor has {'several chat templates' if template else 'no chat template'}", _REMEDY
            )
        self._chat = ChatTemplate(self.tokenizer, chat_template_arguments or {}, template)
        self.eos_token_id: int = self.tokenizer.convert_tokens_to_ids(self._chat.end)
        self._tokenizer_eos: int | None = self.tokenizer.eos_token_id
        self.pad_token_id: int = next(
            token
            for token in (self.tokenizer.pad_token_id, self._tokenizer_eos, self.eos_token_id)
            if token is not None
        )
        self.warning = self._chat.remark
        self._image_text = lru_cache(_SIZES_KEPT)(self._text_of_image)
        self._require_image_arguments()
        self._require_equal_rows()

    @classmethod
    def load(cls, folder: Path, max_length: int | None = None, **settings: Any) -> VisionLanguageProcessor:
        """Read the processor of a model folder.

        Args:
            max_length: fewer positions than the model has; image tokens count.
            settings: see `__init__`.

        Raises:
            UserError: no processor there that can be used.
        """
        quiet_libraries()
        require_model(folder)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{folder}: no config can be read from it: {load_error_message(error, folder)}"
            raise UserError(problem, load_error_remedy(error, _REMEDY)) from None
        if getattr(config, "is_encoder_decoder", False):
            problem = f"{folder}: {config.model_type} is an encoder-decoder without a chat template"
            raise UserError(f"{problem}; model.family: vlm takes decoders only")
        try:
            processor = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_fast=False
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            problem = f"{folder}: no processor can be read from it: {load_error_message(error, folder)}"
            raise UserError(problem, _package_remedy(error) or load_error_remedy(error, _REMEDY)) from None
        if not hasattr(processor, "image_processor") or not getattr(processor, "image_token", None):
            raise UserError(f"{folder}: its processor ({type(processor).__name__}) takes no images", _REMEDY)
        text = config.get_text_config()
        limits = [limit for limit in (max_length, getattr(text, "max_position_embeddings", None)) if limit]
        try:
            return cls(processor, config, min(limits, default=None), **settings)
        except UserError as error:
            raise UserError(f"{folder}: {error.problem}", error.remedy) from None

    @property
    def stop_token_ids(self) -> set[int]:
        """What ends an answer: the end of a turn, where it is another token than the end of the sequence."""
        return {self.eos_token_id, *([] if self._tokenizer_eos is None else [self._tokenizer_eos])}

    def encode_train(self, prompt: str, image: Images, answer: str) -> EncodedExample:
        """A row to learn from; only its answer can be cut off, never an image."""
        (asked,) = self.encode_prompts([prompt], image)
        row = self._encode_whole(prompt, answer, [one.size for one in as_images(image)], asked.input_ids)
        ids = row.input_ids
        if self.max_length and len(ids) > self.max_length:
            ids = ids[: max(self.max_length, len(asked.input_ids))]
        first = len(row.input_ids) - row.n_labels
        return replace(row, input_ids=ids, n_labels=max(0, len(ids) - first), image_inputs=asked.image_inputs)

    def _encode_whole(self, prompt: str, answer: str, sizes: Sequence[Size], prompt_ids: list[int]) -> EncodedExample:
        """A row without its pixels, however long.

        Args:
            sizes: of its images.
            prompt_ids: of its prompt.
        """
        if not (self._all_turns and self._conversations):
            answer_ids = self.encode_answer(answer)
            return EncodedExample([*prompt_ids, *answer_ids], len(answer_ids))

        def ids_of(turns: str) -> list[int]:
            if turns == prompt:
                return prompt_ids
            texts = self._image_texts(sizes)
            placed = texts[: count_images(_turns(turns))] if count_images(_turns(prompt)) else texts
            return self._prompt_ids([turns], [placed])[0]

        return encode_conversation(ids_of, self.encode_answer, prompt, answer)

    def encode_prompts(self, prompts: Sequence[str], image: Images) -> list[EncodedExample]:
        """Rows to be answered about the same images, each exactly a training row before its answer; they share the
        pixels."""
        images = as_images(image)
        if not images:
            return [EncodedExample(ids, 0) for ids in self._prompt_ids(prompts, [[]] * len(prompts))]
        encoded = self._process(self._placeholder * len(images), *images)
        found = encoded.pop("input_ids")[0].count(self._image_id)
        texts = self._image_texts([one.size for one in images])
        image_inputs = {name: _tensor(value) for name, value in encoded.items() if name not in _TYPE_IDS}
        rows = [EncodedExample(ids, 0, image_inputs) for ids in self._prompt_ids(prompts, [texts] * len(prompts))]
        for row in rows:
            if row.input_ids.count(self._image_id) != found:
                sizes = ", ".join(f"{one.width} × {one.height}" for one in images)
                raise UserError(f"images of {sizes} pixels have other tokens than their sizes tell")
        return rows

    def encode_answer(self, answer: str) -> list[int]:
        """An answer and the end of its turn."""
        return self._chat.answer_ids([answer])[0]

    def token_lengths(
        self, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Size]] | None = None
    ) -> list[tuple[int, int]]:
        """Tokens of every prompt, image tokens included, and of every answer with its end; with `all_turns` the first
        answer ends a prompt."""
        images = images or [[]] * len(prompts)
        asked = self._prompt_ids(prompts, [self._image_texts(sizes) for sizes in images])
        if self._all_turns and self._conversations:
            whole = zip(prompts, answers, images, asked, strict=True)
            rows = [self._encode_whole(*row) for row in whole]
            return [(len(row.input_ids) - row.n_labels, row.n_labels) for row in rows]
        pairs = zip(asked, self._chat.answer_ids(answers), strict=True)
        return [(len(prompt), len(answer)) for prompt, answer in pairs]

    def collate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Pad rows on the left and stack them; positions are left to the model, which some count in three ways.

        Returns:
            input_ids, attention_mask, labels, and what the model has of `_TYPE_IDS`: shape (rows, longest), int64; the
            image processor's arguments, whose first axis counts images, tiles or patches; how many of these are a
            row's (`encoding.PER_ROW`).
        """
        batch = pad_left(rows, self.pad_token_id)
        types = (batch["input_ids"] == self._image_id).long()
        return {**batch, **dict.fromkeys(self._type_ids, types), **join_image_inputs(rows)}

    def add_blank_image(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of text with one more row, which has a blank image and no labels: some models count the tokens of
        their images, or add features in deeper layers."""
        return append_rows(batch, self._blank_row, self.pad_token_id)

    def collate_generate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The model's arguments of `collate`."""
        return {name: tensor for name, tensor in model_inputs(self.collate(rows)).items() if name != "use_cache"}

    def embed_prompts(self, model: torch.nn.Module, rows: Sequence[EncodedExample]) -> dict[str, Any]:
        """A batch of questions on the model's device.

        Features are not merged into embeddings here: some models add features in deeper layers too, and count
        positions by the ids.

        Returns:
            As `collate_generate`; position_ids: shape ([3,] rows, longest); next_position: shape (rows, 1).
        """
        device = next(model.parameters()).device
        batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.collate_generate(rows).items()}
        mask = batch["attention_mask"]
        core = _core(model)
        if not hasattr(core, "get_rope_index"):
            positions = position_ids(mask, first=0)
            return {**batch, "position_ids": positions, "next_position": positions[:, -1:] + 1}
        known = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw") if name in batch}
        positions, _ = core.get_rope_index(**known, attention_mask=mask)  # type: ignore[operator]
        return {**batch, "position_ids": positions, "next_position": positions.amax(dim=0)[:, -1:] + 1}

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids → text, without special tokens and without what the template writes around every answer."""
        return self._chat.strip_answer(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the processor."""
        self.processor.save_pretrained(folder)

    @cached_property
    def _type_ids(self) -> list[str]:
        """Which of `_TYPE_IDS` the model's processor makes."""
        return [name for name in _TYPE_IDS if name in self._process(self._placeholder, _blank(_PROBE_SIZES[0]))]

    @cached_property
    def _blank_row(self) -> dict[str, Tensor]:
        return self.collate(self.encode_prompts([""], _blank(_PROBE_SIZES[0])))

    def _prompt_ids(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[list[int]]:
        """
        Args:
            images: the texts in the places of every prompt's images.
        """
        texts = []
        for prompt, shown in zip(prompts, images, strict=True):
            pieces = self._render(prompt, len(shown)).split(self._placeholder)
            if len(pieces) != len(shown) + 1:
                problem = f"the model's chat template writes {len(pieces) - 1} images for {len(shown)}"
                raise UserError(problem)
            texts.append("".join(part for pair in zip(pieces, [*shown, ""], strict=True) for part in pair))
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, prompt: str, images: int = 1) -> str:
        turns = prompt if self._conversations and prompt else json.dumps([{"role": "user", "content": prompt}])
        return self._chat.prompt(turns, images)

    def _process(self, text: str, *images: Image.Image) -> dict[str, Any]:
        """What the processor makes of one text with its images."""
        try:
            encoded = self.processor(
                text=[text], images=[list(images)], padding=False, add_special_tokens=False, **self._image_arguments
            )
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
            sizes = ", ".join(f"{image.width} × {image.height}" for image in images)
            reason = " ".join(str(error).split())
            remedy = f"Check model.image_arguments: {self._image_arguments}." if self._image_arguments else ""
            raise UserError(f"the model's processor rejects an image of {sizes} pixels: {reason}", remedy) from None
        ids = [list(map(int, row)) for row in encoded["input_ids"]]
        return {**{name: value for name, value in encoded.items() if name != "attention_mask"}, "input_ids": ids}

    def _image_texts(self, sizes: Sequence[Size]) -> list[str]:
        """What the processor writes in the places of a row's images."""
        return [self._image_text(size, len(sizes) > 1) for size in sizes]

    def _text_of_image(self, size: Size, several: bool) -> str:
        """What the processor writes in the place of an image of a size (width, height).

        Args:
            several: whether the row has several images; some models then cut none of them into tiles.
        """
        count = 2 if several else 1
        ids = self._process(self._placeholder * count, *[_blank(size)] * count)["input_ids"][0]
        ids = ids[: len(ids) // count]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _require_image_arguments(self) -> None:
        """
        Raises:
            UserError: an argument that the image processor does not know: it would change nothing; a lower bound above
                the upper one, of which processors silently ignore one.
        """
        size = self._image_arguments.get("size")
        for given, low, high in (
            (self._image_arguments, "min_pixels", "max_pixels"),
            (size if isinstance(size, Mapping) else {}, "shortest_edge", "longest_edge"),
            (self._image_arguments, "min_patches", "max_patches"),
        ):
            least, most = given.get(low), given.get(high)
            if isinstance(least, int) and isinstance(most, int) and least > most:
                raise UserError(f"model.image_arguments: {low} ({least}) is larger than {high} ({most})")
        images = self.processor.image_processor
        known = set(getattr(images.valid_kwargs, "__annotations__", {})) | {"min_pixels", "max_pixels"} & set(
            vars(images)
        )
        for name in self._image_arguments:
            if name not in known:
                problem = f"model.image_arguments: the model's image processor ({type(images).__name__}) has no {name}"
                raise UserError(problem, f"It has: {', '.join(sorted(known))}.")

    def _require_equal_rows(self) -> None:
        """
        Raises:
            UserError: a prompt with an image would get other ids here than the processor gives it.
        """
        prompt = self._render(json.dumps([{"role": "user", "content": "a\nb"}]) if self._conversations else "a\nb", 1)
        for size in _PROBE_SIZES:
            theirs = self._process(prompt, _blank(size))
            text = prompt.replace(self._placeholder, self._image_text(size, False))
            ours = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            types = [int(token == self._image_id) for token in ours]
            if ours != theirs["input_ids"][0] or any(
                list(map(int, theirs[name][0])) != types for name in self._type_ids
            ):
                kind = type(self.processor).__name__
                raise UserError(f"{kind} puts other tokens around an image than ftlib would; it is not supported")


def _turns(prompt: str) -> list[dict[str, Any]]:
    said = json.loads(prompt)
    turns: list[dict[str, Any]] = said["messages"] if isinstance(said, dict) else said
    return turns


def _core(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head, of an adapted model too."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    core: torch.nn.Module = base.model
    return core


def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def _tensor(value: Any) -> Tensor:
    """One argument of the image processor: an array, or a list of arrays of one shape."""
    if isinstance(value, list) and not isinstance(value[0], int):
        return torch.stack([torch.as_tensor(one) for one in value])
    return torch.as_tensor(value)


def _package_remedy(error: Exception) -> str:
    """How to install what transformers misses."""
    missing = [name for name in ("torchvision", "num2words") if name in str(error).lower()]
    return f"pip install 'ftlib[vlm]' ({' and '.join(missing)}); ftlib doctor CONFIG checks it" if missing else ""


def module_group(model: torch.nn.Module, name: str) -> str:
    """The part that a parameter belongs to: embeddings (and the head), language, vision, or else projector.

    Qwen's tower has the projector (its merger) in it.
    """
    from transformers import PreTrainedModel

    assert isinstance(model, PreTrainedModel)
    module = model.get_submodule(name.rpartition(".")[0])
    if any(module is table for table in (model.get_input_embeddings(), model.get_output_embeddings())):
        return "embeddings"
    names = {id(one): path for path, one in model.named_modules()}
    encoder = model.get_encoder("image")
    for part, owner in (("language", model.get_decoder()), ("vision", encoder)):
        if f"{name}.".startswith(f"{names[id(owner)]}."):
            return "projector" if part == "vision" and "merger" in name else part
    return "projector"


@register_model(name="vlm")
def make_family() -> ModelFamily:
    return ModelFamily(
        load_processor,
        module_group,
        never_quantized=(
            *(f".*{name}" for name in ("vision_tower", "visual", "vision_model", "multi_modal_projector", "connector")),
            ".*embed_vision",
            *NEVER_QUANTIZED,
        ),
    )


def load_processor(folder: Path, config: Config) -> VisionLanguageProcessor:
    """The processor of a model folder, as a config asks; see `VisionLanguageProcessor.load`."""
    return VisionLanguageProcessor.load(
        folder,
        max_length=config.model.max_length,
        conversations=config.data.prompt == CHAT,
        chat_template_arguments=config.model.chat_template_arguments,
        image_arguments=config.model.image_arguments,
        all_turns=config.data.chat_turns == "all",
    )
