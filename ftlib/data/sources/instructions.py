"""Instructions without images: Alpaca's and Dolly's fields, or chats, `{"messages": [{"role", "content"}]}`.

A JSON list or JSONL, with any file name. In an instruction, `input` (Dolly: `context`) is its context, `system` the
system prompt, `history` the earlier turns as [question, answer] pairs; all are optional. `output` is the answer (Dolly:
`response`). `data.columns` sets other names for instruction (`prefix`) and output (`suffix`). Chats may have ShareGPT's
format, `{"conversations": [{"from", "value"}]}`, with an optional `system` text. Source of the first format:
the Alpaca project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.files import json_sha256
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.prompts import history_turns
from ftlib.data.sources.annotations import annotation_paths, chunks_of, read_files
from ftlib.data.sources.base import (
    CHAT_COLUMNS,
    RowParser,
    answer_of,
    extra_fields,
    record_id,
    references_of,
    require_text,
    text_of,
)
from ftlib.data.sources.json_stream import FileChunk, read_records
from ftlib.data.split_names import NamedSplit, SplitNames

_DEFAULTS = ("data.jsonl", "data.json")
_ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"} | {
    role: role for role in _ROLES
}
"""Allowed values of `from` → role."""

_WEIGHTS = frozenset({"weight", "train", "training", "loss", "loss_weight"})
"""Fields that say whether a message is trained on (OpenAI, axolotl, ms-swift and others)."""

_JUDGED = ("label", "kto_tag")
"""Fields of a record that rate its answer in TRL, LLaMA-Factory and ms-swift."""

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_SHAPING = frozenset(
    {"tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "train_detail"}
)
"""Fields of a message that are not supported and would change the prompt or the answer."""


_READ = frozenset({"role", "content", "from", "value"}) | _WEIGHTS | _MEDIA | _SHAPING
"""Fields of a message that are used or rejected."""


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
    """Yield a row for each instruction, and for each answer of a chat that is trained on.

    Raises:
        UserError: as `annotations.read_files` and `json_stream.read_records`.
    """
    parser = partial(instruction_parser, data.columns)
    return read_files(data, splits, _DEFAULTS, lambda path: read_records(path, data.encoding, chunk), parser, chunk)


def instruction_parser(columns: Mapping[Any, str], splits: SplitNames, outer: NamedSplit | None = None) -> RowParser:
    """Return a parser of records into rows without images; a record with an ID, or a chat, is a group.

    An instruction's facts are instruction, input and the record's other fields. A chat gives a row for each answer that
    is trained on: its facts are the messages before it, the last one also as instruction, and the record's other
    fields. A record whose answer is marked as bad is invalid.

    Args:
        splits, outer: see `SplitNames.of_row`.
    """
    names = {"prefix": "instruction", "suffix": "output", "id": "id", "references": "references"} | dict(columns)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        split = splits.of_row(record, outer)
        if split is None:
            return []
        rows = rows_of(record)
        for row in rows:
            row.part, row.part_name = split.split, split.name
        return rows

    def rows_of(record: dict[str, Any]) -> list[Example]:
        key = record_id(record, names["id"])
        if name := _first_nonempty(record, _MEDIA):
            raise ValueError(f"field {name}: source instructions is text-only; use source jsonl for images")
        if unwanted := next((name for name in _JUDGED if record.get(name) is False and name != names["suffix"]), ""):
            raise ValueError(f"field {unwanted}: false marks a bad answer, which must not be trained on")
        chats = [name for name in CHAT_COLUMNS if record.get(name) is not None]
        if len(chats) > 1:
            raise ValueError(f"fields {' and '.join(chats)}: only one of them is allowed")
        if chats:
            return _turns(key, record, chats[0], {names["id"], *CHAT_COLUMNS, "system"})
        return [_instruction(key, record, names)]

    return parse


def _instruction(key: str, record: dict[str, Any], names: Mapping[Any, str]) -> Example:
    answer = names["suffix"]
    if answer == "output" and answer not in record and "response" in record:
        answer = "response"
    instruction, output = text_of(record, names["prefix"]), answer_of(record, answer)
    if not instruction.strip():
        raise ValueError(f"field {names['prefix']}: is empty")
    known = {names["id"], names["prefix"], answer, names["references"]}
    facts = extra_fields(record, known)
    facts |= {"instruction": instruction, "input": _context(record, known)}
    if facts.get("history") or facts.get("system"):
        history_turns(facts)
    return Example(
        key, "", instruction, require_text(output, answer), references_of(record, names["references"]), facts, group=key
    )


def _context(record: dict[str, Any], known: set[str]) -> str:
    """Return an instruction's input, or Dolly's context, or ""."""
    own = "" if record.get("input") is None else text_of(record, "input")
    if record.get("context") is None or "context" in known:
        return own
    dollys = text_of(record, "context")
    if own.strip() and dollys.strip():
        raise ValueError("fields input and context: only one is allowed; rename the one that is not part of the prompt")
    return own if own.strip() else dollys


def _turns(key: str, record: dict[str, Any], field: str, own: set[str]) -> list[Example]:
    if record.get("tools") not in (None, "", "[]", [], {}):
        raise ValueError("field tools: chats with tools are not supported")
    said, learned = _messages(record, field)
    group = key or json_sha256(said)[:16]  # all answers of a chat are in one group
    rows: list[Example] = []
    answers = 0
    others = extra_fields(record, own)
    for index, message in enumerate(said):
        if message["role"] != "assistant":
            continue
        answers += 1
        if not learned[index]:
            continue
        before = said[:index]
        if not before or before[-1]["role"] != "user":
            raise ValueError(f"field {field}: message {index + 1} is an answer without a user message before it")
        question = before[-1]["content"]
        facts = others | {"messages": before, "instruction": question, "input": ""}
        answer = require_text(message["content"], field)
        name = f"{key}-{answers}" if key else ""
        rows.append(Example(name, "", question, answer, facts=facts, group=group))
    if not answers or said[-1]["role"] != "assistant":
        raise ValueError(f"field {field}: the last message must be an answer (role assistant)")
    if not rows:
        raise ValueError(f"field {field}: none of its answers is marked to be trained on")
    rows[0].unlabelled_turns = answers - len(rows)
    unused = {name for message in record[field] for name in message} - _READ
    rows[0].unused = frozenset(f"{field}.{name}" for name in unused)
    return rows


def _messages(record: dict[str, Any], field: str) -> tuple[list[dict[str, str]], list[bool]]:
    """Return the turns of a chat, and whether each answer is trained on."""
    messages = record[field]
    if not isinstance(messages, list):
        raise ValueError(f"field {field}: must be a list of messages, got {messages!r}"[:200])
    said: list[dict[str, str]] = []
    learned: list[bool] = []
    for number, message in enumerate(messages, 1):
        try:
            said.append(_turn(message))
            learned.append(_has_loss(message))
        except ValueError as error:
            raise ValueError(f"field {field}: message {number}: {error}") from None
    if system := record.get("system"):
        if not isinstance(system, str):
            raise ValueError(f"field system: must be text, got {system!r}"[:200])
        if any(turn["role"] == "system" for turn in said):
            raise ValueError(f"field system: {field} also has a system message")
        if system.strip():
            said, learned = [{"role": "system", "content": system}, *said], [False, *learned]
    return said, learned


def _turn(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError("must be an object with a text `content`")
    if name := _first_nonempty(message, _MEDIA):
        raise ValueError(f"field {name}: source instructions is text-only")
    if name := _first_nonempty(message, _SHAPING):
        raise ValueError(f"field {name}: is not supported")
    sharegpt = "from" in message and "role" not in message
    role = message.get("from" if sharegpt else "role")
    known = _SHAREGPT.get(role) if sharegpt and isinstance(role, str) else role
    if known not in _ROLES:
        shown = repr(role)[:50]
        raise ValueError(f"role {' or '.join(_SHAREGPT if sharegpt else _ROLES)} expected, got {shown}")
    name = "value" if sharegpt else "content"
    return {"role": known, "content": _content(message.get(name), name)}


def _content(content: Any, name: str) -> str:
    """Return a message's text, which may be a list of parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if kinds := sorted({str(part.get("type"))[:20] for part in parts} - {"text"}):
            raise ValueError(f"a part of type {kinds[0]}: source instructions is text-only")
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"must be an object with a text `{name}`")
    return content


def _first_nonempty(record: dict[str, Any], names: frozenset[str]) -> str:
    """Return the first of some fields that is not empty, or ""."""
    return "" if names.isdisjoint(record) else min((name for name in names & record.keys() if record[name]), default="")


def _has_loss(message: dict[str, Any]) -> bool:
    if _WEIGHTS.isdisjoint(message):
        return True
    found = {name: message[name] for name in sorted(_WEIGHTS) if message.get(name) is not None}
    for name, weight in found.items():
        if weight not in (0, 1):
            raise ValueError(f"field {name}: must be 0 or 1, got {weight!r}"[:100])
    return all(found.values())
