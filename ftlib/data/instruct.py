"""Prompts of instructions: the Alpaca form with and without a context, and conversations for a model's chat template.

The Alpaca form is that of Stanford Alpaca (R. Taori et al., 2023): a preamble, then the fields under `###` markers, the
answer under the last one. Where user text itself holds such a marker, a backslash is put before it (`\\### Response:`),
so that it can neither end the prompt nor begin a field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ftlib.data.examples import Example
from ftlib.errors import UserError

ALPACA = "alpaca"

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_MARKER_LINE = re.compile(r"^#{2,}[ \t]*(\w[^{}\n]*?)[ \t]*:?[ \t]*$", re.MULTILINE)


def alpaca_prompt(example: Example) -> str:
    """The instruction (a row's prefix) and its input, if it has one, in Alpaca's form."""
    template = _WITH_INPUT if context_of(example) else _WITHOUT_INPUT
    fields = {"instruction": example.prefix.strip(), "input": context_of(example)}
    return template.format(**without_markers(template, fields))


def chat_prompt(example: Example) -> str:
    """The turns before the answer, as JSON: `[{"role": …, "content": …}, …]`.

    They are the row's `messages` if it has any, without the answer; else one turn of the user: the instruction, and its
    input behind an empty line.

    Raises:
        UserError: messages that are no list of turns, or none before the answer.
    """
    if "messages" not in example.facts:
        texts = [example.prefix.strip(), context_of(example)]
        return json.dumps([_turn("user", "\n\n".join(text for text in texts if text))], ensure_ascii=False)
    turns = example.facts["messages"]
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise UserError(f'row {example.id}: field messages: must be a list of {{"role": …, "content": …}}')
    turns = [_turn(turn["role"], turn["content"]) for turn in turns]
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise UserError(f"row {example.id}: field messages: nothing stands before the answer")
    return json.dumps(turns, ensure_ascii=False)


def context_of(example: Example) -> str:
    """The input of an instruction; empty for none."""
    context = example.facts.get("input", "")
    return context.strip() if isinstance(context, str) else ""


def without_markers(template: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Fields with a backslash before every field marker (`### Word:`) that the template itself has.

    Number of hashes from two up, space and case do not matter. Templates without markers leave fields as they are.
    """
    words = "|".join(re.escape(word) for word in _MARKER_LINE.findall(template))
    if not words:
        return dict(fields)
    marker = re.compile(rf"#{{2,}}\s*(?:{words})\s*[:：]", re.IGNORECASE)
    return {name: marker.sub(lambda match: "\\" + match[0], text) for name, text in fields.items()}


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
