"""Instructions and conversations, with and without images: the form of each record is recognized by its fields.

A JSON list or JSONL, with any file name. Forms of a record:

- Alpaca, LLaMA-Factory: `instruction`, `input`, `output`, `system`, `history`; Dolly: `context`, `response`.
- OpenAI, LLaMA-Factory: `messages` of `{"role", "content"}`, also with parts, tool calls and `tools`.
- ShareGPT, LLaVA: `conversations` of `{"from", "value"}`, with an optional `system` text.
- TRL: `prompt` and `completion`, texts or messages.
- `text` alone: raw text for language modelling.

Images are in parts of messages, or in `image` or `images` beside them (see conversations.py). `data.columns` sets other
names. Source of the first form: the Alpaca project.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.files import json_sha256
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.prompts import NO_LOSS, answer_of_turn, history_turns
from ftlib.data.sources.annotations import annotation_paths, chunks_of, read_files
from ftlib.data.sources.base import (
    CHAT_COLUMNS,
    RowParser,
    answer_of,
    extra_fields,
    record_id,
    record_images,
    references_of,
    require_text,
    text_of,
)
from ftlib.data.sources.conversations import (
    Conversation,
    image_parts,
    read_conversation,
    read_tools,
    text_of_turn,
)
from ftlib.data.sources.image_references import ImageLocator
from ftlib.data.sources.json_stream import FileChunk, read_records
from ftlib.data.split_names import NamedSplit, SplitNames

_DEFAULTS = ("data.jsonl", "data.json")
_JUDGED = ("label", "kto_tag")
"""Fields of a record that rate its answer in TRL, LLaMA-Factory and ms-swift."""

_REJECTED = ("rejected", "rejected_response", "rejected_messages")
"""Fields with the worse answer of a preference pair in TRL, LLaMA-Factory and ms-swift."""

_MOVING = frozenset({"video", "videos", "audio", "audios"})
_TRL = ("prompt", "completion")
_RAW = "text"
_PLACEHOLDERS = re.compile(r"\A(?:\s*<image>)+\s*|(?:\s*<image>)+\s*\Z")
"""LLaVA's placeholders before or behind an instruction."""


def files(data: Data) -> list[Path]:
    """Return the files that `examples` reads; default: data.jsonl or data.json.

    Raises:
        UserError: both default files exist, or neither.
    """
    return annotation_paths(data, *_DEFAULTS)


def chunks(data: Data) -> list[FileChunk]:
    """Return the rows in chunks for several processes; empty if they must be read sequentially.

    Raises:
        UserError: as `examples`.
    """
    return chunks_of(data, *_DEFAULTS)


@register_source(name="instructions")
@register_source(name="string_tasks")
def examples(
    data: Data, splits: SplitNames | None = None, chunk: FileChunk | None = None
) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each instruction, and for each answer of a chat that is trained on (see `data.chat_turns`).

    Raises:
        UserError: as `annotations.read_files` and `json_stream.read_records`.
    """
    parser = partial(instruction_parser, data)
    return read_files(data, splits, _DEFAULTS, lambda path: read_records(path, data.encoding, chunk), parser, chunk)


def instruction_parser(
    data: Data, splits: SplitNames, outer: NamedSplit | None = None, columns: Mapping[Any, str] | None = None
) -> RowParser:
    """Return a parser of records into rows; a record with an ID, or a chat, is a group.

    An instruction's facts are instruction, input and the record's other fields. A chat gives a row for each answer that
    is trained on: its facts are the messages before it, the last one also as instruction, and the record's other
    fields; with another `data.chat_turns` it is one row. A record whose answer is marked as bad is invalid.

    Args:
        splits, outer: see `SplitNames.of_row`.
        columns: instead of `data.columns`.
    """
    records = _Records(data, dict(data.columns if columns is None else columns))

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        split = splits.of_row(record, outer)
        if split is None:
            return []
        rows = records.rows(record)
        for row in rows:
            row.part, row.part_name = split.split, split.name
        return rows

    return parse


@dataclass(frozen=True)
class _Records:
    """Turns records into rows, as a dataset's config asks."""

    data: Data
    columns: Mapping[Any, str]

    def rows(self, record: dict[str, Any]) -> list[Example]:
        usual = {"prefix": "instruction", "suffix": "output", "id": "id", "references": "references"}
        names: dict[Any, str] = {**usual, **self.columns}
        key = record_id(record, names["id"])
        if name := next((name for name in sorted(_MOVING & record.keys()) if record[name]), ""):
            raise ValueError(f"field {name}: videos and sounds are not supported")
        if unwanted := next((name for name in _JUDGED if record.get(name) is False and name != names["suffix"]), ""):
            raise ValueError(f"field {unwanted}: false marks a bad answer, which must not be trained on")
        chosen = {"messages", "suffix"} & self.columns.keys()
        if pair := next((name for name in _REJECTED if record.get(name) and not chosen), ""):
            remedy = "to train on the better answer, set data.columns: {messages: …} or {prefix: …, suffix: …}"
            raise ValueError(f"field {pair}: preference pairs are not supported; {remedy}")
        lists = self._messages(record, names)
        if lists:
            return self._turns(key, record, lists, names)
        if record.get(_RAW) is not None and "prefix" not in self.columns and not _has_question(record, names):
            return [self._raw(key, record, names)]
        named = {"prefix", "suffix"} & self.columns.keys() or names["prefix"] in record
        if all(isinstance(record.get(name), str) for name in _TRL) and not named:
            names |= {"prefix": _TRL[0], "suffix": _TRL[1]}
        return [self._instruction(key, record, names)]

    def _messages(self, record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """Return field → messages of a conversation; empty for another form.

        Raises:
            ValueError: the record can be read in two forms.
        """
        forms: dict[str, list[str]] = {}
        chosen = self.columns.get("messages")
        chats = [name for name in ([chosen] if chosen else CHAT_COLUMNS) if record.get(name) is not None]
        if len(chats) > 1:
            raise ValueError(f"fields {' and '.join(chats)}: only one of them is allowed")
        if chats:
            forms["a conversation"] = chats
        if all(record.get(name) not in (None, "", []) for name in _TRL):
            forms["TRL's form"] = list(_TRL)
        pair = [names["prefix"], next((n for n in (names["suffix"], "response") if record.get(n)), names["suffix"])]
        if all(record.get(name) not in (None, "") for name in pair):
            forms["an instruction"] = pair
        if chats and chosen:
            return {chosen: record[chosen]}
        if "prefix" in self.columns and "an instruction" in forms:
            return {}
        if len(forms) > 1:
            told = " and as ".join(f"{form} ({', '.join(fields)})" for form, fields in forms.items())
            raise ValueError(
                f"can be read as {told}; set data.columns: {{messages: …}} or {{prefix: …, suffix: …}}, or remove one"
            )
        if chats:
            return {chats[0]: record[chats[0]]}
        if forms.keys() == {"TRL's form"} and any(isinstance(record[name], list) for name in _TRL):
            return {name: record[name] for name in _TRL}
        return {}

    def _raw(self, key: str, record: dict[str, Any], names: Mapping[str, str]) -> Example:
        images, own = record_images(record, self.columns)
        if images:
            raise ValueError(f"field {_RAW}: raw text shows no images; write a conversation")
        facts = extra_fields(record, {names["id"], _RAW, names["references"], *own})
        text = require_text(answer_of(record, _RAW), _RAW)
        return Example(key, "", "", text, references_of(record, names["references"]), facts, group=key)

    def _instruction(self, key: str, record: dict[str, Any], names: Mapping[Any, str]) -> Example:
        answer = names["suffix"]
        if answer == "output" and answer not in record and "response" in record:
            answer = "response"
        instruction, output = text_of(record, names["prefix"]), answer_of(record, answer)
        images, own = record_images(record, self.columns)
        if images and "<image>" in output:
            raise ValueError(f"field {answer}: <image> in an answer; only the user shows images")
        placed = images is not None and _has_placed_images(record, instruction)
        if images is not None and not placed:
            instruction = _without_placeholders(instruction, len(images), names["prefix"])
        if not instruction.strip():
            raise ValueError(f"field {names['prefix']}: is empty")
        known = {names["id"], names["prefix"], answer, names["references"]}
        empty = {name for name in CHAT_COLUMNS if record.get(name) is None}  # of a table with records of other forms
        facts = extra_fields(record, known | own | empty)
        facts |= {"instruction": instruction, "input": _context(record, known)}
        if "tools" in facts:
            facts["tools"] = read_tools(facts["tools"])
        if facts.get("history") or facts.get("system"):
            history_turns(facts)
        if placed:
            facts, instruction = _with_placed_images(facts, images or [], names["prefix"])
        row = Example(
            key,
            "",
            instruction,
            require_text(output, answer),
            references_of(record, names["references"]),
            facts,
            group=key,
        )
        row.image, row.other_images = self._located(images or [])
        return row

    def _turns(
        self, key: str, record: dict[str, Any], lists: Mapping[str, Any], names: Mapping[Any, str]
    ) -> list[Example]:
        given, own = record_images(record, self.columns)
        chat = read_conversation(lists, given, record.get("system"), prompts=_TRL[: len(lists) - 1])
        tools = read_tools(record.get("tools"))
        said = [chat.turns, chat.images] if chat.images else chat.turns
        group = key or json_sha256(said)[:16]  # all answers of a chat are in one group
        facts = extra_fields(record, {names["id"], *lists, *CHAT_COLUMNS, "system", *own})
        if tools:
            facts["tools"] = tools
        field = next(iter(lists)) if len(lists) == 1 else _TRL[1]
        answers = [number for number, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
        if not answers or chat.turns[-1]["role"] != "assistant":
            raise ValueError(f"field {field}: the last message must be an answer (role assistant)")
        learned = [number for number in answers if chat.learned[number]]
        for number in learned:
            if not number or chat.turns[number - 1]["role"] not in ("user", "tool"):
                raise ValueError(f"field {field}: message {number + 1} is an answer without a user message before it")
        if not learned:
            raise ValueError(f"field {field}: none of its answers is marked to be trained on")
        if record.get("history"):
            raise ValueError(f"field history: {field} also has earlier turns")
        mode = self.data.chat_turns
        for number in learned if mode == "all" else []:
            require_text(answer_of_turn(chat.turns[number]), f"{field}: message {number + 1}")
        rows = []
        for number in learned if mode == "rows" else learned[-1:]:
            before = chat.turns[:number]
            if mode == "all":
                before = [
                    turn | NO_LOSS if turn["role"] == "assistant" and not chat.learned[at] else turn
                    for at, turn in enumerate(before)
                ]
            question = text_of_turn(before[-1])
            answer = require_text(answer_of_turn(chat.turns[number]), field)
            name = f"{key}-{answers.index(number) + 1}" if key and mode == "rows" else key
            own_facts = facts | {"messages": before, "instruction": question, "input": ""}
            row = Example(name, "", question, answer, facts=own_facts, group=group)
            row.image, row.other_images = self._located(_shown(chat, number))
            rows.append(row)
        rows[0].unlabelled_turns = len(answers) - (1 if mode == "last" else len(learned))
        rows[0].unused = frozenset(chat.unused)
        return rows

    def _located(self, references: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """Return the paths of the first image ("" if there is none) and of the others."""
        locate = ImageLocator(self.data)
        first, *others = [locate(reference) for reference in references] or [""]
        return first, tuple(others)


def _has_question(record: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return any(record.get(name) is not None for name in (names["prefix"], *_TRL, "output", "response"))


def _shown(chat: Conversation, answer: int) -> list[str]:
    """Return the images of the turns before an answer: all of them if no turn has parts for them."""
    return chat.images[: image_parts(chat.turns[:answer])] if image_parts(chat.turns) else chat.images


def _without_placeholders(instruction: str, images: int, field: str) -> str:
    """Return an instruction without LLaVA's placeholders at its beginning or end; images stand before the question."""
    text = _PLACEHOLDERS.sub("", instruction) if "<image>" in instruction else instruction
    if (found := instruction.count("<image>")) not in (0, images) or "<image>" in text:
        where = "; images between words need `messages`" if found == images else ""
        raise ValueError(f"field {field}: {found} placeholders <image> for {images} images{where}")
    return text


def _has_placed_images(record: Mapping[str, Any], instruction: str) -> bool:
    """Whether placeholders say in which of several texts of an instruction its images are."""
    history, context = record.get("history"), record.get("input")
    earlier = [text for pair in history if isinstance(pair, list) for text in pair] if isinstance(history, list) else []
    others = [text for text in (*earlier, context, record.get("system")) if isinstance(text, str)]
    return any("<image>" in text for text in others) or (bool(earlier) and "<image>" in instruction)


def _with_placed_images(facts: dict[str, Any], images: list[str], field: str) -> tuple[dict[str, Any], str]:
    """Return an instruction's facts with its texts as turns that have the images in their places, and its question.

    Raises:
        ValueError: other numbers of images and placeholders, or one in an answer.
    """
    asked = "\n\n".join(text for text in (facts["instruction"], facts["input"]) if text.strip())
    turns = [*history_turns(facts), {"role": "user", "content": asked}]
    said = read_conversation({field: turns}, images).turns
    question = text_of_turn(said[-1])
    rest = {name: value for name, value in facts.items() if name not in ("history", "system")}
    return rest | {"messages": said, "instruction": question, "input": ""}, question


def _context(record: dict[str, Any], known: set[str]) -> str:
    """Return an instruction's input, or Dolly's context, or ""."""
    own = "" if record.get("input") is None else text_of(record, "input")
    if record.get("context") is None or "context" in known:
        return own
    dollys = text_of(record, "context")
    if own.strip() and dollys.strip():
        raise ValueError("fields input and context: only one is allowed; rename the one that is not part of the prompt")
    return own if own.strip() else dollys
