"""Prompt templates with named fields, such as `answer en {question}`."""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftlib.config.schema import CHAT
from ftlib.data.example import Example, plain_text
from ftlib.errors import UserError

# Prompts of instructions: the Alpaca form with and without a context, and conversations for a model's chat template.
#
# The Alpaca form is that of Stanford Alpaca (R. Taori et al., 2023): a preamble, then the fields under `###` markers,
# the answer under the last one. Where user text itself holds such a marker, a backslash is put before it (`\###
# Response:`), so that it can neither end the prompt nor begin a field.

ALPACA = "alpaca"
CHAT_FIELDS = frozenset({"instruction", "input", "system", "history", "messages"})
"""The fields of a row that the prompts of this module show, where it has them."""

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
    """The instruction (a row's prefix) and its input, if it has one, in Alpaca's form.

    What the model is told first (a `system` text or message) takes the preamble's place; turns before the instruction
    stand before it as instructions and responses.

    Raises:
        UserError: as `previous_turns`; or the model is told something between the turns, or last.
    """
    context = context_of(example)
    preamble = _WITH_INPUT if context else _WITHOUT_INPUT
    turns = previous_turns(example)
    if turns and turns[0]["role"] == "system":
        preamble, turns = turns[0]["content"], turns[1:]
    names = {"user": "instruction", "assistant": "response"}
    if strange := [turn["role"] for turn in turns if turn["role"] not in names]:
        problem = f"row {example.id}: prompt alpaca has no place for a message of role {strange[0]} behind the first"
        raise UserError(problem, "Set data.prompt: chat.")
    said = [(names[turn["role"]], turn["content"]) for turn in turns] + [("instruction", example.prefix)]
    if context:
        said.append(("input", context))
    blocks = [_BLOCKS[name].format(_escape_alpaca_markers(text)) for name, text in said]
    return f"{_escape_alpaca_markers(preamble)}\n\n{''.join(blocks)}### Response:\n"


def chat_prompt(example: Example) -> str:
    """The turns before the answer, as JSON: `[{"role": …, "content": …}, …]`.

    They are the row's `messages` if it has any, without the answer; else its `system` text, its `history` and one turn
    of the user: the instruction, and its input behind an empty line.

    Raises:
        UserError: messages that are no list of turns, or none before the answer.
    """
    if "messages" in example.facts:
        turns = _turns_of_messages(example)
    else:
        texts = [example.prefix, context_of(example)]
        turns = [*previous_turns(example), _turn("user", "\n\n".join(text for text in texts if text.strip()))]
    return json.dumps(turns, ensure_ascii=False)


def previous_turns(example: Example) -> list[dict[str, str]]:
    """What was said before a row's question: its messages but the last, or its `system` text and its `history`.

    Raises:
        UserError: messages or a history that are none.
    """
    if "messages" in example.facts:
        return _turns_of_messages(example)[:-1]
    try:
        return history_turns(example.facts)
    except ValueError as error:
        raise UserError(f"row {example.id}: {error}") from None


def history_turns(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """An instruction's `system` text and its `history` of [question, answer] pairs, as turns.

    Raises:
        ValueError: something else.
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
    """The input of an instruction; empty for none."""
    context = example.facts.get("input", "")
    return context if isinstance(context, str) and context.strip() else ""


def escape_markers(template: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Fields with a backslash before every field marker (`### Word:`) that the template itself has.

    Number of hashes from two up, space and case do not matter. Templates without markers leave fields as they are.
    """
    found = filter(None, map(_MARKER_LINE.fullmatch, template.split("\n")))
    words = [line[1].rstrip(_BLANKS).removesuffix(":").rstrip(_BLANKS) for line in found]
    if not words:
        return dict(fields)
    marker = _markers(words)
    return {name: marker.sub(lambda match: "\\" + match[0], text) for name, text in fields.items()}


def _markers(words: Iterable[str]) -> re.Pattern[str]:
    """What finds field markers; only at the first of their hashes, since a long run of them would be tried at each."""
    return re.compile(rf"(?<!#)#{{2,}}\s*(?:{'|'.join(map(re.escape, words))})\s*[:：]", re.IGNORECASE)


_MARKERS = _markers(("Instruction", "Input", "Response"))
"""Alpaca's own."""


def _escape_alpaca_markers(text: str) -> str:
    """A text without Alpaca's own markers."""
    return _MARKERS.sub(lambda match: "\\" + match[0], text)


def _turns_of_messages(example: Example) -> list[dict[str, str]]:
    turns = example.facts["messages"]
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise UserError(f'row {example.id}: field messages: must be a list of {{"role": …, "content": …}}')
    turns = [_turn(turn["role"], turn["content"]) for turn in turns]
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise UserError(f"row {example.id}: field messages: nothing stands before the answer")
    return turns


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Templates: the words of the config, or one of the forms above.

PromptTemplates = str | Mapping[str, str]
"""A prompt for all rows, or dataset → prompt."""

BUILTIN_TEMPLATES: dict[str, Callable[[Example], str]] = {ALPACA: alpaca_prompt, CHAT: chat_prompt}
"""Prompts that are more than a template, by the name that `data.prompt` gives."""

_MEDIA_MARKER = re.compile("<(?:image|video|audio)>")
"""Where other programs put the image into a prompt; here it would be learned as text."""


@functools.lru_cache(maxsize=64)
def template_fields(template: str) -> frozenset[str]:
    """The names in braces.

    Raises:
        UserError: unbalanced braces, or more than a plain name in them.
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
    """The fields of a row that a prompt shows."""
    return CHAT_FIELDS if template in BUILTIN_TEMPLATES else template_fields(template)


def render(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template. Braces inside the fields' own text are left as they are.

    Raises:
        UserError: the template names a field that the row lacks.
    """
    missing = template_fields(template) - set(fields)
    if missing:
        have = ", ".join(sorted(fields))
        raise UserError(f"prompt {template!r} names {', '.join(sorted(missing))}, but the rows have only: {have}")
    return string.Formatter().vformat(template, (), dict(fields))


def render_prompt(example: Example, templates: PromptTemplates) -> str:
    """The prompt that a row is asked with, in training and in evaluation.

    Args:
        templates: one of `BUILTIN_TEMPLATES`, or a text with fields; of a mixture one for each dataset. Field markers
            (`### Word:`) of the template are defused in the row's own text.
    """
    template = templates if isinstance(templates, str) else templates[example.dataset]
    if template in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[template](example)
    texts = {name: text for name, value in example.facts.items() if (text := plain_text(value)) is not None}
    return render(template, escape_markers(template, texts | {"prefix": example.prefix}))


def prompt_checker(template: str) -> Callable[[Example], str]:
    """What finds rows that are not asked as they should be: row → what is wrong with it; "" for nothing.

    These are rows that lack a field of the template, those with turns before the question that would not be shown, and
    those with an image and its marker (`<image>`) in their text.

    Args:
        template: `data.prompt`.

    Raises:
        UserError: a template that is none.
    """
    if template in BUILTIN_TEMPLATES:
        return functools.partial(_conversation_error, BUILTIN_TEMPLATES[template])
    return functools.partial(_template_error, template, template_fields(template) - {"prefix"})


def hides_context(template: str, row: Example) -> bool:
    """Whether a row is an instruction with an input that a prompt does not show: to be told, since it may be meant."""
    return not row.image and prompt_fields(template).isdisjoint({"input", "context"}) and bool(context_of(row))


def _conversation_error(prompt: Callable[[Example], str], row: Example) -> str:
    facts = row.facts
    if "messages" in facts or facts.get("history") or facts.get("system"):
        try:
            prompt(row)
        except UserError as error:
            return error.problem
    return ""


def _template_error(template: str, names: frozenset[str], row: Example) -> str:
    facts = row.facts
    for name in names:
        if name not in facts:
            have = ", ".join(sorted({"prefix", *facts}))
            return f"field {name}: is missing, but data.prompt names it; there are: {have}"[:300]
        if plain_text(facts[name]) is None:
            return f"field {name}: data.prompt names it, so it must be text or a number, got {facts[name]!r}"[:200]
    if not row.image:
        return _omitted_fields(template, names, row)
    named = [(name, str(facts[name])) for name in names]
    for name, text in (("prefix", row.prefix), ("suffix", row.suffix), ("data.prompt", template), *named):
        if marker := _MEDIA_MARKER.search(text):
            return f"field {name}: {marker[0]} would be learned as text; the image is always shown, remove it"
    return ""


def _omitted_fields(template: str, names: frozenset[str], row: Example) -> str:
    """What of an instruction a template has no place for."""
    remedy = f"data.prompt, {template!r}, has no place for it: set data.prompt: chat or alpaca"
    try:
        turns = previous_turns(row)
    except UserError as error:
        return error.problem
    if any(turn["role"] != "system" for turn in turns):
        return f"what was said before the question: {remedy}"
    if turns and "system" not in names:
        return f"what the model is told first (system): {remedy}"
    return ""
