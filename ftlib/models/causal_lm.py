"""Causal language models: what one row looks like, for training and for asking, side by side.

A row is `[bos] prompt answer <eos>`, bos where the model's own tokenizer puts one (an empty prompt without one is
`<eos>`: a text begins where another ended); prompt and answer are tokenized apart, so that a question is exactly a
training row before its answer. With the model's chat template a prompt is a conversation (JSON, see
`data/prompts.py`), rendered by the template, and an answer is written as `chat.py` says. Rows are padded on the left
and bring their positions along: without them GPT-2 counts the padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftlib.config.schema import CHAT, Config
from ftlib.core.registry import register_model
from ftlib.errors import UserError
from ftlib.models.chat import ChatTemplate, encode_conversation, leading_bos, load_tokenizer
from ftlib.models.encoding import IGNORE_INDEX, EncodedExample, Images, Size, labels_of, pad_left, position_ids
from ftlib.models.registry import ModelFamily


class CausalProcessor:
    """Turns prompts and answers into rows, and rows into batches."""

    prefix_bidirectional = False
    length_depends_on_image = False
    takes_images = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        chat: bool = False,
        labels_on: Literal["response", "everything"] = "response",
        packing: bool = False,
        chat_template_arguments: Mapping[str, Any] | None = None,
        all_turns: bool = False,
    ) -> None:
        """
        Args:
            max_length: positions that a row may have.
            chat: prompts are conversations, rendered by the tokenizer's chat template.
            labels_on: what carries loss; the very first token never does.
            packing: whether training rows share sequences, see `collate`.
            chat_template_arguments: see `chat.ChatTemplate`.
            all_turns: all answers of a conversation carry loss, not only the last, see `chat.encode_conversation`.

        Raises:
            UserError: the tokenizer has no end-of-sequence token, or no chat template that will do where one is wanted.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels_on = labels_on
        self.packing = packing
        self._all_turns = all_turns
        if tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no end-of-sequence token, so answers could not end")
        self._tokenizer_eos: int = tokenizer.eos_token_id
        self.pad_token_id: int = self._tokenizer_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._bos = leading_bos(tokenizer)
        self.prefix_length = len(self._bos)
        self._chat = ChatTemplate(tokenizer, chat_template_arguments or {}) if chat else None
        self.eos_token_id: int = tokenizer.convert_tokens_to_ids(self._chat.end) if self._chat else self._tokenizer_eos
        self.warning = self._chat.remark if self._chat else ""

    @classmethod
    def load(cls, folder: Path, max_length: int | None = None, **settings: Any) -> CausalProcessor:
        """Read the tokenizer of a model folder.

        Args:
            max_length: fewer positions than the model has.
            settings: see `__init__`.

        Raises:
            UserError: no tokenizer there, or one of another model.
        """
        tokenizer, config = load_tokenizer(folder)
        limits = [limit for limit in (max_length, getattr(config, "max_position_embeddings", None)) if limit]
        return cls(tokenizer, min(limits, default=None), **settings)

    @property
    def stop_token_ids(self) -> set[int]:
        """What ends an answer: the end of a turn, where it is another token than the end of the sequence."""
        return {self.eos_token_id, self._tokenizer_eos}

    def encode_train(self, prompt: str, image: Images, answer: str) -> EncodedExample:
        """A row to learn from; what goes beyond the model's positions is cut off at its end."""
        row = self._encode_whole(prompt, answer)
        ids = row.input_ids[: self.max_length]
        first = 1 if self.labels_on == "everything" else len(row.input_ids) - row.n_labels
        return replace(row, input_ids=ids, n_labels=len(ids) - first)

    def _encode_whole(self, prompt: str, answer: str) -> EncodedExample:
        if self._all_turns and self.labels_on == "response":
            return encode_conversation(lambda turns: self._prompt_ids([turns])[0], self.encode_answer, prompt, answer)
        answer_ids = self.encode_answer(answer)
        return EncodedExample([*self._prompt_ids([prompt])[0], *answer_ids], len(answer_ids))

    def encode_prompts(self, prompts: Sequence[str], image: Images) -> list[EncodedExample]:
        """Rows to be answered, each exactly a training row before its answer."""
        return [EncodedExample(ids, 0) for ids in self._prompt_ids(prompts)]

    def encode_answer(self, answer: str) -> list[int]:
        """An answer and its end."""
        return self._answer_ids([answer])[0]

    def token_lengths(
        self, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Size]] | None = None
    ) -> list[tuple[int, int]]:
        """Tokens of every prompt and of every answer with its end; with `all_turns` the first answer ends a prompt."""
        if self._all_turns:
            rows = [self._encode_whole(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
            return [(len(row.input_ids) - row.n_labels, row.n_labels) for row in rows]
        pairs = zip(self._prompt_ids(prompts), self._answer_ids(answers), strict=True)
        return [(len(prompt), len(answer)) for prompt, answer in pairs]

    def collate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Rows padded on the left; packed, as many as fit stand one behind the other in the length of the longest.

        Returns:
            input_ids, position_ids, labels: shape (sequences, longest), int64; and attention_mask, unless packed: then
            the positions, which start anew with every row, say what belongs together.
        """
        if not self.packing:
            batch = pad_left(rows, self.pad_token_id)
            return {**batch, "position_ids": position_ids(batch["attention_mask"], first=0)}
        sequences = [_concatenate(group) for group in _pack_rows(rows)]
        longest = max(len(ids) for ids, _, _ in sequences)
        columns = zip(
            ("input_ids", "position_ids", "labels"), (self.pad_token_id, 0, IGNORE_INDEX), range(3), strict=True
        )
        return {
            name: torch.tensor([[filler] * (longest - len(one[place])) + one[place] for one in sequences])
            for name, filler, place in columns
        }

    def collate_generate(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Rows padded on the left: input_ids, attention_mask, shape (rows, longest); positions follow from the mask."""
        batch = pad_left(rows, self.pad_token_id)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def embed_prompts(self, model: torch.nn.Module, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """A batch of questions on the model's device.

        Returns:
            inputs_embeds: shape (rows, longest, hidden); attention_mask, position_ids: shape (rows, longest);
            next_position: shape (rows, 1).
        """
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate_generate(rows).items()}
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))  # type: ignore[operator]
        positions = position_ids(batch["attention_mask"], first=0)
        return {"inputs_embeds": embedded, **batch, "position_ids": positions, "next_position": positions[:, -1:] + 1}

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids → text, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return self._chat.strip_answer(text) if self._chat else text

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def _prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if self._chat is None:
            return [[*self._bos, *ids] or [self._tokenizer_eos] for ids in self._text_ids(prompts)]
        asked = [self._chat.prompt(prompt) for prompt in prompts]
        ids: list[list[int]] = self.tokenizer(asked, add_special_tokens=False)["input_ids"]
        return ids

    def _answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        if self._chat is not None:
            return self._chat.answer_ids(answers)
        return [[*ids, self.eos_token_id] for ids in self._text_ids(answers)]

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Special tokens written out in user text (`</s>`) stay text."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids


def validate_model(model: torch.nn.Module, name: str) -> None:
    """Refuse an architecture that takes no positions: padded on the left, it would count the padding.

    Raises:
        UserError: it lacks an argument that ftlib relies on.
    """
    known = inspect.signature(model.forward).parameters
    missing = [argument for argument in ("position_ids", "logits_to_keep") if argument not in known]
    if missing:
        raise UserError(f"{name}: {type(model).__name__} takes no {' and no '.join(missing)}, which ftlib relies on")


def module_group(model: torch.nn.Module, name: str) -> str:
    """The part that a parameter belongs to: embeddings (and the head, tied to them or not) or language."""
    from transformers import PreTrainedModel

    assert isinstance(model, PreTrainedModel)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    module = model.get_submodule(name.rpartition(".")[0])
    return "embeddings" if any(module is table for table in tables) else "language"


@register_model(name="causal")
def make_family() -> ModelFamily:
    return ModelFamily(load_processor, module_group)


def load_processor(folder: Path, config: Config) -> CausalProcessor:
    """The processor of a model folder, as a config asks; see `CausalProcessor.load`."""
    return CausalProcessor.load(
        folder,
        max_length=config.model.max_length,
        chat=config.data.prompt == CHAT,
        labels_on=config.loss.on,
        packing=config.loss.packing,
        chat_template_arguments=config.model.chat_template_arguments,
        all_turns=config.data.chat_turns == "all",
    )


def _pack_rows(rows: Sequence[EncodedExample]) -> list[list[EncodedExample]]:
    """Rows in groups whose lengths together are at most the longest row's: first fit, longest first."""
    room = max(len(row.input_ids) for row in rows)
    groups: list[list[EncodedExample]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        for group in groups:
            if sum(len(one.input_ids) for one in group) + len(row.input_ids) <= room:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _concatenate(rows: Sequence[EncodedExample]) -> tuple[list[int], list[int], list[int]]:
    """Ids, positions and labels of rows that stand one behind the other."""
    ids = [token for row in rows for token in row.input_ids]
    positions = [position for row in rows for position in range(len(row.input_ids))]
    labels = [label for row in rows for label in labels_of(row)]
    return ids, positions, labels
