"""Prompt templates with named fields, such as `answer en {question}`."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping

from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.data.instruct import ALPACA, alpaca_prompt, chat_prompt, without_markers
from ftlib.errors import UserError

Templates = str | Mapping[str, str]
"""A prompt for all rows, or dataset → prompt."""

NAMED: dict[str, Callable[[Example], str]] = {ALPACA: alpaca_prompt, CHAT: chat_prompt}
"""Prompts that are more than a template, by the name that `data.prompt` gives."""


def template_fields(template: str) -> set[str]:
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
    return names


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


def prompt_of(example: Example, templates: Templates) -> str:
    """The prompt that a row is asked with, in training and in evaluation.

    Args:
        templates: one of `NAMED`, or a text with fields; of a mixture one for each dataset. Field markers (`### Word:`)
            of the template are defused in the row's own text.
    """
    template = templates if isinstance(templates, str) else templates[example.dataset]
    if template in NAMED:
        return NAMED[template](example)
    texts = {name: value for name, value in example.facts.items() if isinstance(value, str)}
    return render(template, without_markers(template, texts | {"prefix": example.prefix}))
