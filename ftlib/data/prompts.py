"""Prompt templates with named fields, such as `answer en {question}`, and the Alpaca format.

Conversations are written by the model's own chat template: models/chat.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftlib.config.schema import CHAT
from ftlib.data.example import Example, plain_text
from ftlib.errors import UserError

# Prompts for instructions: the Alpaca format with and without input, and conversations for a model's chat template.
#
# The Alpaca format is that of Stanford Alpaca (R. Taori et al., 2023): a preamble, then the fields under `###` markers,
# the answer under the last one. A marker in user text is escaped with a backslash (`\### Response:`), so that it can
# neither end the prompt nor start a field.

ALPACA = "alpaca"
CHAT_FIELDS = frozenset({"instruction", "input", "system", "history", "messages"})
"""Fields of a row that these prompts show if the row has them."""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_BLOCKS = {
    "instruction": "### Instruction:\n{}\n\n",
    "input": "### Input:\n{}\n\n",
    "response": "### Response:\n{}\n\n",
}
_MARKER_LINE = re.compile(r"#{2,}[ \t]*(\w[^{}]*)")
_BLANKS = " \t"


def alpaca_prompt(example: Example) -> str:
    """Return the instruction (a row's prefix) and its input, if any, in Alpaca's format.

    A system prompt (`system` field or message) replaces the preamble; earlier turns are written before the instruction
    as instructions and responses.

    Raises:
        UserError: as `previous_turns`; or there is a system message after the first turn.
    """
    context = context_of(example)
    preamble = _WITH_INPUT if context else _WITHOUT_INPUT
    turns = previous_turns(example)
    if turns and turns[0]["role"] == "system":
        preamble, turns = turns[0]["content"], turns[1:]
    names = {"user": "instruction", "assistant": "response"}
    asked = _turns_of_messages(example)[-1] if "messages" in example.facts else {}
    if (
        example.facts.get("tools")
        or asked.get("role") == "tool"
        or _has_images_between_words(asked)
        or any("tool_calls" in turn or not isinstance(turn["content"], str) for turn in turns)
    ):
        problem = f"row {example.id}: prompt alpaca shows no tools, and no images between words"
        raise UserError(problem, "Set data.prompt: chat.")
    if strange := [turn["role"] for turn in turns if turn["role"] not in names]:
        problem = f"row {example.id}: prompt alpaca supports a message of role {strange[0]} only as the first"
        raise UserError(problem, "Set data.prompt: chat.")
    said = [(names[turn["role"]], turn["content"]) for turn in turns] + [("instruction", example.prefix)]
    if context:
        said.append(("input", context))
    blocks = [_BLOCKS[name].format(_escape_alpaca_markers(text)) for name, text in said]
    return f"{_escape_alpaca_markers(preamble)}\n\n{''.join(blocks)}### Response:\n"


NO_LOSS = {"weight": 0}
"""Marks an answer among the turns of a prompt that is not trained on where others are (`data.chat_turns: all`)."""


def answer_of_turn(turn: Mapping[str, Any]) -> str:
    """Return the answer of a row for a turn: its text, or with tool calls its JSON."""
    return json.dumps(turn, ensure_ascii=False) if turn.get("tool_calls") else str(turn["content"])


def turn_of_answer(answer: str) -> dict[str, Any]:
    """Return the turn of `answer_of_turn`."""
    if answer.startswith('{"role": "assistant"') and '"tool_calls"' in answer:
        with contextlib.suppress(ValueError):
            turn: dict[str, Any] = json.loads(answer)
            return turn
    return {"role": "assistant", "content": answer}


def chat_prompt(example: Example) -> str:
    """Return the turns before the answer as JSON: `[{"role": …, "content": …}, …]`.

    These are the row's `messages` without the answer, if it has any; else its `system` text, its `history` and a user
    turn: the instruction and, after an empty line, its input. With `tools` of the row it is an object of `messages` and
    `tools`.

    Raises:
        UserError: `messages` is not a list of turns, or has none before the answer.
    """
    if "messages" in example.facts:
        turns = _turns_of_messages(example)
    else:
        texts = [example.prefix, context_of(example)]
        turns = [*previous_turns(example), _turn("user", "\n\n".join(text for text in texts if text.strip()))]
    tools = example.facts.get("tools")
    shown = {"messages": turns, "tools": tools} if isinstance(tools, list) and tools else turns
    return json.dumps(shown, ensure_ascii=False)


def previous_turns(example: Example) -> list[dict[str, Any]]:
    """Return the turns before a row's question: from its messages, or its `system` text and `history`.

    Raises:
        UserError: `messages` or `history` is invalid.
    """
    if "messages" in example.facts:
        return _turns_of_messages(example)[:-1]
    try:
        return history_turns(example.facts)
    except ValueError as error:
        raise UserError(f"row {example.id}: {error}") from None


def history_turns(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an instruction's `system` text and its `history` of [question, answer] pairs as turns.

    Raises:
        ValueError: a field is invalid.
    """
    system, history = facts.get("system"), facts.get("history")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"field system: must be text, got {system!r}"[:200])
    turns = [_turn("system", system)] if system and system.strip() else []
    pairs = history or []
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise ValueError(f"field history: must be a list of [question, answer] pairs, got {history!r}"[:200])
    return turns + [_turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def context_of(example: Example) -> str:
    """Return the input of an instruction, or ""."""
    context = example.facts.get("input", "")
    return context if isinstance(context, str) and context.strip() else ""


def escape_markers(template: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Escape, in field values, every field marker (`### Word:`) of the template with a backslash.

    Two or more hashes match; whitespace and case are ignored. Without markers in the template, fields stay unchanged.
    """
    found = filter(None, map(_MARKER_LINE.fullmatch, template.split("\n")))
    words = [line[1].rstrip(_BLANKS).removesuffix(":").rstrip(_BLANKS) for line in found]
    if not words:
        return dict(fields)
    marker = _markers(words)
    return {name: marker.sub(lambda match: "\\" + match[0], text) for name, text in fields.items()}


def _markers(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for field markers; it matches only at the first hash, so that long runs take linear time."""
    return re.compile(rf"(?<!#)#{{2,}}\s*(?:{'|'.join(map(re.escape, words))})\s*[:：]", re.IGNORECASE)


_MARKERS = _markers(("Instruction", "Input", "Response"))
"""The markers of the Alpaca format."""


def _escape_alpaca_markers(text: str) -> str:
    """Return a text with Alpaca's markers escaped."""
    return _MARKERS.sub(lambda match: "\\" + match[0], text)


def _turns_of_messages(example: Example) -> list[dict[str, Any]]:
    turns = example.facts["messages"]
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise UserError(f'row {example.id}: field messages: must be a list of {{"role": …, "content": …}}')
    turns = [{name: turn[name] for name in _TURN_FIELDS if turn.get(name) is not None} for turn in turns]
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise UserError(f"row {example.id}: field messages: there is no turn before the answer")
    return turns


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    parts = content if isinstance(content, list) else []
    return isinstance(content, str) or (bool(parts) and all(isinstance(part, dict) for part in parts))


_TURN_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", *NO_LOSS)
"""Of a message: what chat templates read, and the mark of `NO_LOSS`."""


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# Templates: a text with fields from the config, or one of the formats above.

PromptTemplates = str | Mapping[str, str]
"""The prompt of all rows, or dataset → prompt."""

BUILTIN_TEMPLATES: dict[str, Callable[[Example], str]] = {ALPACA: alpaca_prompt, CHAT: chat_prompt}
"""Built-in values of `data.prompt` → function that renders the prompt."""

_NO_ID = "row : "
"""Begins the text of an error about a row that has no ID yet."""

_MEDIA_MARKER = re.compile("<(?:image|video|audio)>")
"""Image placeholders of other programs; ftlib would train on them as text."""


@functools.lru_cache(maxsize=64)
def template_fields(template: str) -> frozenset[str]:
    """Return the names in braces.

    Raises:
        UserError: unbalanced braces, or something else than a name in them.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt {template!r}: {error}", "Write a literal brace as {{ or }}.") from None
    names = set()
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise UserError(f"prompt {template!r}: {{{name}}} is not a plain field name")
        names.add(name)
    return frozenset(names)


def prompt_fields(template: str) -> frozenset[str]:
    """Return the fields of a row that a prompt shows."""
    return CHAT_FIELDS if template in BUILTIN_TEMPLATES else template_fields(template)


def render(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template. Braces in the values of fields stay unchanged.

    Raises:
        UserError: the template names a field that the row lacks.
    """
    missing = template_fields(template) - set(fields)
    if missing:
        have = ", ".join(sorted(fields))
        raise UserError(f"prompt {template!r} names {', '.join(sorted(missing))}, but the rows only have: {have}")
    return string.Formatter().vformat(template, (), dict(fields))


def render_prompt(example: Example, templates: PromptTemplates) -> str:
    """Return the prompt of a row, in training and in evaluation.

    Args:
        templates: one of `BUILTIN_TEMPLATES`, or a text with fields; for a mixture, one for each dataset. Field markers
            (`### Word:`) of the template are escaped in the row's text.
    """
    template = templates if isinstance(templates, str) else templates[example.dataset]
    if template in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[template](example)
    texts = {name: text for name, value in example.facts.items() if (text := plain_text(value)) is not None}
    return render(template, escape_markers(template, texts | {"prefix": example.prefix}))


def prompt_checker(template: str) -> Callable[[Example], str]:
    """Return a function that checks whether a row fits a template: row → error, or "".

    Errors are: a missing field, earlier turns that the template would not show, and an image placeholder (`<image>`) in
    the text of a row with an image.

    Args:
        template: `data.prompt`.

    Raises:
        UserError: the template is invalid.
    """
    if template in BUILTIN_TEMPLATES:
        return functools.partial(_conversation_error, BUILTIN_TEMPLATES[template])
    return functools.partial(_template_error, template, template_fields(template) - {"prefix"})


def hides_context(template: str, row: Example) -> bool:
    """Whether a row has an input that the prompt does not show, which may be a mistake."""
    return not row.image and prompt_fields(template).isdisjoint({"input", "context"}) and bool(context_of(row))


def _conversation_error(prompt: Callable[[Example], str], row: Example) -> str:
    facts = row.facts
    if not (row.prefix or row.image or facts.keys() & {"instruction", "messages"}):
        return "raw text (field text) has no question; set data.prompt: '{prefix}'"
    if "messages" in facts or any(map(facts.get, ("history", "system", "tools"))):
        try:
            prompt(row)
        except UserError as error:
            return error.problem.removeprefix(_NO_ID)
    return ""


def _template_error(template: str, names: frozenset[str], row: Example) -> str:
    facts = row.facts
    for name in names:
        if name not in facts:
            have = ", ".join(sorted({"prefix", *facts}))
            return f"field {name}: is missing, but data.prompt uses it; available: {have}"[:300]
        if plain_text(facts[name]) is None:
            return f"field {name}: data.prompt uses it, so it must be text or a number, got {facts[name]!r}"[:200]
    told = not row.image or ("instruction" in facts and facts.keys() & {"messages", "history", "system", "tools"})
    if told and (omitted := _omitted_fields(template, names, row)):
        return omitted
    if not row.image:
        return ""
    named = [(name, str(facts[name])) for name in names]
    for name, text in (("prefix", row.prefix), ("suffix", row.suffix), ("data.prompt", template), *named):
        if marker := _MEDIA_MARKER.search(text):
            return f"field {name}: {marker[0]} would be trained on as text; remove it: the image is always shown"
    return ""


def _omitted_fields(template: str, names: frozenset[str], row: Example) -> str:
    """Return an error if a template omits earlier turns or the system prompt of a row, else ""."""
    remedy = f"not shown by data.prompt {template!r}; set data.prompt: chat or alpaca"
    try:
        turns = previous_turns(row)
    except UserError as error:
        return error.problem.removeprefix(_NO_ID)
    if any(turn["role"] != "system" for turn in turns):
        return f"earlier turns of the conversation: {remedy}"
    if turns and "system" not in names:
        return f"system prompt: {remedy}"
    facts = row.facts
    asked = facts["messages"][-1] if isinstance(facts.get("messages"), list) else {}
    has_tools = isinstance(facts.get("tools"), list) and facts["tools"] and facts.keys() & {"instruction", "messages"}
    if has_tools or "tool_calls" in asked or asked.get("role") == "tool":
        return f"tools: {remedy.removesuffix(' or alpaca')}"
    if _has_images_between_words(asked):
        return f"images between words: {remedy.removesuffix(' or alpaca')}"
    return ""


def _has_images_between_words(turn: Mapping[str, Any]) -> bool:
    """Whether an image of a turn does not stand before all of its texts."""
    content = turn.get("content")
    kinds = [part.get("type") == "image" for part in content] if isinstance(content, list) else []
    return kinds != sorted(kinds, reverse=True)
