"""Interactive session with a trained run.

With the model's chat template (`data.prompt: chat`) questions are turns of a conversation, until `/reset`; with any
other prompt they are independent. `/image FILE` sets the image, `/context TEXT` (or a text file) the context; questions
are then answered without and with the context, and the latter answer is kept in the conversation. Without a value,
either is removed. `/quit` or the end of the input ends the session. Questions may come from a pipe.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.cli import arguments
from ftlib.core import imports, log
from ftlib.core.paths import find_site
from ftlib.errors import UserError
from ftlib.models.libraries import hide_unused_packages_of

if TYPE_CHECKING:
    from ftlib.config.schema import Evaluation
    from ftlib.evaluation.model import EvalModel
    from ftlib.evaluation.predict import Query

_UNDECODABLE = re.compile("[\ud800-\udfff]")
"""Bytes that are no text, as `surrogateescape` reads them."""

COMMANDS = ("/image", "/context", "/reset", "/quit")
SINGLE_TURN_NOTICE = "Questions are independent: the prompt of this run does not include earlier ones."


def main(argv: list[str]) -> int:
    """`ftlib chat RUN [--max-new-tokens N]`"""
    command = arguments.make_parser("chat", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name, or the folder of a model")
    arguments.add_max_new_tokens_argument(command)
    parsed = command.parse_args(argv)
    site = find_site()
    name = arguments.find_model_or_run(parsed.run, site)
    hide_unused_packages_of(name, site)
    with imports.quick_imports():
        from ftlib.evaluation.predict import Query, is_multi_turn, open_finetuned

    model, settings = open_finetuned(name, parsed.max_new_tokens, site)
    if not is_multi_turn(model):
        log.warning(SINGLE_TURN_NOTICE)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    query: Query | None = Query("")
    while query is not None:
        print("> ", end="", file=sys.stderr, flush=True) if sys.stdin.isatty() else None
        line = sys.stdin.readline()
        if not line:
            break
        query = _handle_line(model, settings, query, line.strip())
    return 0


def _handle_line(model: EvalModel, settings: Evaluation, query: Query, line: str) -> Query | None:
    """Handle one line; user errors are reported, and the session continues.

    Returns:
        Image, context and history of the next question; None at the end.
    """
    if line == "/quit":
        return None
    try:
        if _UNDECODABLE.search(line):
            raise UserError("this line is not UTF-8, so it is ignored", "Convert the input: iconv -f ENCODING -t UTF-8")
        if line.startswith("/"):
            return _run_command(model, query, *line.partition(" ")[::2])
        if line:
            return _answer(model, settings, replace(query, prompt=line))
    except UserError as error:
        log.error(f"ftlib: {error}")
    return query


def _run_command(model: EvalModel, query: Query, name: str, value: str) -> Query:
    from ftlib.data.images import open_query_image
    from ftlib.evaluation.predict import text_or_file

    if name == "/context":
        return replace(query, context=text_or_file(value.strip()))
    if name == "/reset":
        return replace(query, history=())
    if name != "/image":
        raise UserError(f"{name}: no such command", f"Available: {', '.join(COMMANDS)}")
    if value:
        open_query_image(Path(value.strip()), model.config.data)
    return replace(query, image=Path(value.strip()) if value else None)


def _answer(model: EvalModel, settings: Evaluation, query: Query) -> Query:
    from ftlib.evaluation.predict import (
        answer_queries,
        append_turn,
        is_multi_turn,
        truncate_history,
        with_and_without_context,
    )

    asked = truncate_history(model, settings, query)
    if len(asked.history) < len(query.history):
        log.warning("The oldest questions were dropped: the conversation is too long for the model.")
    found = [answer.text.strip() for answer in answer_queries(model, settings, with_and_without_context([asked]))]
    labels = ("without context: ", "with context:    ") if len(found) == 2 else ("",)
    for label, text in zip(labels, found, strict=True):
        log.print_result(f"{label}{text}")
    return append_turn(model, asked, found[-1]) if is_multi_turn(model) else asked
