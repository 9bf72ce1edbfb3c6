"""Instructions without images: Alpaca's instruction, input, output, or chats `{"messages": [{"role", "content"}]}`.

A JSON list of them (.json) or one in a line (.jsonl). `input` is the context, and may be missing. `data.columns` gives
other names for instruction (as `prefix`) and output (as `suffix`). Source of the first format: the Alpaca project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.fields import identity_of, references_of, text_of
from ftlib.data.loaders.lines import read_json_lines
from ftlib.data.loaders.rows import Numbered, Parse, Reading, needed
from ftlib.data.official.streaming import stream_list
from ftlib.errors import UserError

_DEFAULTS = ("data.jsonl", "data.json")
_ROLES = ("system", "user", "assistant")


def files(data: Data) -> list[Path]:
    """The file that `examples` reads; data.jsonl or data.json if `data.file` names none.

    Raises:
        UserError: it is not clear which.
    """
    root = Path(data.root)
    found = [root / name for name in _DEFAULTS if (root / name).exists()]
    if data.file or len(found) == 1:
        return [root / data.file] if data.file else found
    problem = "both data.jsonl and data.json lie there" if found else "neither data.jsonl nor data.json lies there"
    raise UserError(f"{root}: {problem}", "Name the file in data.file.")


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each instruction, and for each answer of a chat.

    Raises:
        UserError: missing or unreadable file; a .json file that is no list.
    """
    (path,) = files(data)
    parse = instruction_parser(data.columns)
    if path.suffix == ".json":
        yield from Reading().rows(Numbered(path), stream_list(path), parse)
    else:
        yield from Reading().rows(Numbered(path, "line"), read_json_lines(path), parse)


def instruction_parser(columns: Mapping[Any, str]) -> Parse:
    """What turns records into rows, which have no image; a row's group is its record.

    An instruction's facts are instruction, input and the record's other fields. A chat gives a row for each answer:
    its facts are the messages before it, the last of which is the instruction, too.
    """
    names = {"prefix": "instruction", "suffix": "output", "id": "id", "references": "references"} | dict(columns)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        key = identity_of(record, names["id"], number)
        if "messages" in record:
            return _turns(key, record["messages"])
        instruction, output = text_of(record, names["prefix"]), text_of(record, names["suffix"])
        context = "" if record.get("input") is None else text_of(record, "input")
        if not instruction.strip():
            raise ValueError(f"field {names['prefix']}: is empty")
        known = {names["id"], names["prefix"], names["suffix"], names["references"]}
        facts = {name: value for name, value in record.items() if name not in known}
        facts |= {"instruction": instruction, "input": context}
        answer = needed(output, names["suffix"])
        return [Example(key, "", instruction, answer, references_of(record, names["references"]), facts, group=key)]

    return parse


def _turns(key: str, messages: Any) -> list[Example]:
    said = _messages(messages)
    rows: list[Example] = []
    for place, message in enumerate(said):
        before = said[:place]
        if message["role"] != "assistant":
            continue
        if not before or before[-1]["role"] != "user":
            raise ValueError(f"field messages: message {place + 1} answers, but none of the user stands before it")
        question = before[-1]["content"]
        facts = {"messages": before, "instruction": question, "input": ""}
        answer = needed(message["content"], "messages")
        rows.append(Example(f"{key}-{len(rows) + 1}", "", question, answer, facts=facts, group=key))
    if not rows or said[-1]["role"] != "assistant":
        raise ValueError("field messages: the last message must be an answer (role assistant)")
    return rows


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise ValueError(f"field messages: a list of messages is needed, got {messages!r}"[:200])
    said = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"field messages: message {number}: an object with a text `content` is needed")
        if message.get("role") not in _ROLES:
            shown = repr(message.get("role"))[:50]
            raise ValueError(f"field messages: message {number}: role {' or '.join(_ROLES)} expected, got {shown}")
        said.append({"role": message["role"], "content": message["content"]})
    return said
