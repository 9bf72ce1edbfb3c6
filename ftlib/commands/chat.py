"""Ask a trained run question after question.

With the model's chat template (`data.prompt: chat`) a question follows those before it, until `/reset`; with any other
prompt each stands alone. `/image FILE` shows an image from then on, `/context TEXT` (or a text file) tells a context,
which every question is then asked without and with (the latter answer is remembered); alone, either is taken back.
`/quit` or the end of the input ends the session. Questions may come from a pipe.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib import command_line, console
from ftlib.errors import UserError
from ftlib.site import find_site

if TYPE_CHECKING:
    from ftlib.config import Evaluation
    from ftlib.evaluation.questions import Question
    from ftlib.evaluation.subject import Subject

COMMANDS = ("/image", "/context", "/reset", "/quit")
ALONE = "Each question stands alone: the prompt of this run has no place for earlier ones."


def main(argv: list[str]) -> int:
    """`ftlib chat RUN [--max-new-tokens N]`"""
    command = command_line.parser("chat", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command_line.add_max_new_tokens(command)
    parsed = command.parse_args(argv)
    from ftlib.evaluation.questions import Question, open_trained, remembers

    subject, settings = open_trained(parsed.run, parsed.max_new_tokens, find_site())
    if not remembers(subject):
        console.say(ALONE)
    question: Question | None = Question("")
    while question is not None:
        print("> ", end="", file=sys.stderr, flush=True) if sys.stdin.isatty() else None
        line = sys.stdin.readline()
        if not line:
            break
        question = _turn(subject, settings, question, line.strip())
    return 0


def _turn(subject: Subject, settings: Evaluation, question: Question, line: str) -> Question | None:
    """Follow one line; a mistake is said, and the session goes on.

    Returns:
        The image, context and history of the next question; None at the end.
    """
    if line == "/quit":
        return None
    try:
        if line.startswith("/"):
            return _command(question, *line.partition(" ")[::2])
        if line:
            return _answer(subject, settings, replace(question, prompt=line))
    except UserError as error:
        print(f"ftlib: {error}", file=sys.stderr)
    return question


def _command(question: Question, name: str, value: str) -> Question:
    from ftlib.data.images import open_image
    from ftlib.evaluation.questions import text_or_file

    if name == "/context":
        return replace(question, context=text_or_file(value.strip()))
    if name == "/reset":
        return replace(question, history=())
    if name != "/image":
        raise UserError(f"{name}: no such command", f"There are: {', '.join(COMMANDS)}")
    if value:
        open_image(Path(value.strip()))
    return replace(question, image=Path(value.strip()) if value else None)


def _answer(subject: Subject, settings: Evaluation, question: Question) -> Question:
    from ftlib.evaluation.questions import answers, remembers, with_and_without_context, with_answer, within_reach

    asked = within_reach(subject, settings, question)
    if len(asked.history) < len(question.history):
        console.say("The oldest questions are left out: the conversation is too long for the model.")
    found = answers(subject, settings, with_and_without_context([asked]))
    labels = ("without context: ", "with context:    ") if len(found) == 2 else ("",)
    for label, text in zip(labels, found, strict=True):
        print(f"{label}{text}", flush=True)
    return with_answer(subject, asked, found[-1]) if remembers(subject) else asked
