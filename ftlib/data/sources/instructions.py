"""Instructions without images: Alpaca's and Dolly's fields, or chats, `{"messages": [{"role", "content"}]}`.

A list of them in JSON or one in a line, whatever the file is called. Of an instruction, `input` (Dolly: `context`) is
its context, `system` what the model is told first, `history` the turns before, as pairs of question and answer; all may
be missing. `output` is the answer (Dolly: `response`). `data.columns` gives other names for instruction (as `prefix`)
and output (as `suffix`). Chats may be ShareGPT's, `{"conversations": [{"from", "value"}]}`, too, with a `system` text
beside them. Source of the first format: the Alpaca project.
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
"""What `from` may say."""

_WEIGHTS = frozenset({"weight", "train", "training", "loss", "loss_weight"})
"""Fields of a message that say whether it is to be learned: of OpenAI, axolotl, ms-swift and others."""

_JUDGED = ("label", "kto_tag")
"""Fields of a record that say in TRL, LLaMA-Factory and ms-swift whether its answer is a good one."""

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_SHAPING = frozenset(
    {"tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "train_detail"}
)
"""Fields of a message that would change what is asked or learned, and for which a row has no place."""


_READ = frozenset({"role", "content", "from", "value"}) | _WEIGHTS | _MEDIA | _SHAPING
"""Fields of a message that are used or refused."""


def files(data: Data) -> list[Path]:
    """The files that `examples` reads; data.jsonl or data.json if the config names none.

    Raises:
        UserError: it is not clear which.
    """
    return annotation_paths(data, *_DEFAULTS)


def chunks(data: Data) -> list[FileChunk]:
    """The rows in stretches, for several processes to read; none if they must be read from the beginning.

    Raises:
        UserError: as `examples`.
    """
    return chunks_of(data, *_DEFAULTS)


@register_source(name="instructions")
@register_source(name="string_tasks")
def examples(
    data: Data, splits: SplitNames | None = None, chunk: FileChunk | None = None
) -> Iterator[Example | InvalidRecord]:
    """A row for each instruction, and for each answer of a chat that is to be learned.

    Raises:
        UserError: as `annotations.read_files` and `json_stream.read_records`.
    """
    parser = partial(instruction_parser, data.columns)
    return read_files(data, splits, _DEFAULTS, lambda path: read_records(path, data.encoding, chunk), parser, chunk)


def instruction_parser(columns: Mapping[Any, str], splits: SplitNames, outer: NamedSplit | None = None) -> RowParser:
    """What turns records into rows, which have no image; a row's group is its record, if that has an id or is a chat.

    An instruction's facts are instruction, input and the record's other fields. A chat gives a row for each answer that
    is to be learned: its facts are the messages before it, the last of which is the instruction, too, and the record's
    other fields. A record whose answer is marked as a bad one is a faulty one.

    Args:
        splits, outer: say which split a record belongs to, see `SplitNames.of_row`.
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
            raise ValueError(f"field {name}: source instructions is text only; images are for source jsonl")
        if unwanted := next((name for name in _JUDGED if record.get(name) is False and name != names["suffix"]), ""):
            raise ValueError(f"field {unwanted}: false marks an answer that is not wanted, so it must not be learned")
        chats = [name for name in CHAT_COLUMNS if record.get(name) is not None]
        if len(chats) > 1:
            raise ValueError(f"fields {' and '.join(chats)}: both are there, and only one can be learned")
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
    """An instruction's input, or Dolly's context; empty for none."""
    own = "" if record.get("input") is None else text_of(record, "input")
    if record.get("context") is None or "context" in known:
        return own
    dollys = text_of(record, "context")
    if own.strip() and dollys.strip():
        raise ValueError("fields input and context: both are there; rename the one that the model is not to see")
    return own if own.strip() else dollys


def _turns(key: str, record: dict[str, Any], field: str, own: set[str]) -> list[Example]:
    if record.get("tools") not in (None, "", "[]", [], {}):
        raise ValueError("field tools: chats with tools are not supported")
    said, learned = _messages(record, field)
    group = key or json_sha256(said)[:16]  # the answers of a chat stay together
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
            raise ValueError(f"field {field}: message {index + 1} answers, but none of the user stands before it")
        question = before[-1]["content"]
        facts = others | {"messages": before, "instruction": question, "input": ""}
        answer = require_text(message["content"], field)
        name = f"{key}-{answers}" if key else ""
        rows.append(Example(name, "", question, answer, facts=facts, group=group))
    if not answers or said[-1]["role"] != "assistant":
        raise ValueError(f"field {field}: the last message must be an answer (role assistant)")
    if not rows:
        raise ValueError(f"field {field}: none of its answers is to be learned")
    rows[0].unlabelled_turns = answers - len(rows)
    unused = {name for message in record[field] for name in message} - _READ
    rows[0].unused = frozenset(f"{field}.{name}" for name in unused)
    return rows


def _messages(record: dict[str, Any], field: str) -> tuple[list[dict[str, str]], list[bool]]:
    """All turns of a chat, and whether each is to be learned, if it is an answer."""
    messages = record[field]
    if not isinstance(messages, list):
        raise ValueError(f"field {field}: a list of messages is needed, got {messages!r}"[:200])
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
            raise ValueError(f"field system: stands beside {field} that have a system message, too")
        if system.strip():
            said, learned = [{"role": "system", "content": system}, *said], [False, *learned]
    return said, learned


def _turn(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError("an object with a text `content` is needed")
    if name := _first_nonempty(message, _MEDIA):
        raise ValueError(f"field {name}: source instructions is text only")
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
    """A message's text, which may come as a list of parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if kinds := sorted({str(part.get("type"))[:20] for part in parts} - {"text"}):
            raise ValueError(f"a part of type {kinds[0]}: source instructions is text only")
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"an object with a text `{name}` is needed")
    return content


def _first_nonempty(record: dict[str, Any], names: frozenset[str]) -> str:
    """The first of some fields that a record has, and that is not empty; "" for none."""
    return "" if names.isdisjoint(record) else min((name for name in names & record.keys() if record[name]), default="")


def _has_loss(message: dict[str, Any]) -> bool:
    if _WEIGHTS.isdisjoint(message):
        return True
    found = {name: message[name] for name in sorted(_WEIGHTS) if message.get(name) is not None}
    for name, weight in found.items():
        if weight not in (0, 1):
            raise ValueError(f"field {name}: 0 or 1 is needed, got {weight!r}"[:100])
    return all(found.values())
