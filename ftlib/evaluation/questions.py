"""Single questions to a model: from the command line, a file, or a session.

A causal model's question is put into the run's prompt (`data.prompt`) as its instruction, a context as its input.
PaliGemma is given the whole prompt, as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib import runs
from ftlib.config import Config, Evaluation
from ftlib.config_data import CHAT
from ftlib.config_file import load_experiment
from ftlib.data.examples import Example, raise_faults
from ftlib.data.images import frame_of, open_image
from ftlib.data.prompts import NAMED, prompt_of, template_fields
from ftlib.errors import UserError
from ftlib.evaluation.subject import Subject, trained
from ftlib.models.rows import Row
from ftlib.site import Site


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        prompt: the question.
        image: of PaliGemma's questions.
        context: what a causal model is told beside the question; empty for nothing.
        history: what was said before, as turns `{"role", "content"}`; for the model's chat template only.
    """

    prompt: str
    image: Path | None = None
    context: str = ""
    history: tuple[dict[str, str], ...] = ()


def open_trained(name: str, max_new_tokens: int | None, site: Site) -> tuple[Subject, Evaluation]:
    """The model of a run that is done, and how it is asked.

    Args:
        name: run folder or its name.
        max_new_tokens: instead of the config's.

    Raises:
        UserError: no such run, or it is not trained yet.
    """
    run = runs.find_run(name, site)
    config = load_experiment(run.config_file, [], site).config
    if not run.done.exists():
        raise UserError(f"{run.folder}: not trained yet", "Run `ftlib train` first.")
    limit = max_new_tokens or config.evaluation.max_new_tokens
    return trained(config, run, site), config.evaluation.model_copy(update={"max_new_tokens": limit})


def with_and_without_context(questions: Sequence[Question]) -> list[Question]:
    """Every question without its context, and with it behind if it has one."""
    bare = [replace(question, context="") for question in questions]
    return [
        each
        for plain, full in zip(bare, questions, strict=True)
        for each in ((plain, full) if full.context else (plain,))
    ]


def answers(subject: Subject, settings: Evaluation, questions: Sequence[Question]) -> list[str]:
    """Answer questions in batches.

    Raises:
        UserError: an image or a context is missing, not readable, or not for this model.
    """
    rows = [_row(subject, question) for question in questions]
    size = settings.batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [text.strip() for batch in batches for text in subject.answer(batch, settings)]


def remembers(subject: Subject) -> bool:
    """Whether a question may follow others: the model's chat template has a place for what was said before."""
    return subject.config.data.prompt == CHAT


def with_answer(subject: Subject, question: Question, answer: str) -> Question:
    """What the next question begins with: everything that was said, and the answer."""
    said = json.loads(_prompt(subject.config, question))
    return replace(question, prompt="", history=(*said, {"role": "assistant", "content": answer}))


def within_reach(subject: Subject, settings: Evaluation, question: Question) -> Question:
    """The question with as much of its history, the latest, as leaves the model room to answer."""
    limit = subject.inputs.limit
    while limit and question.history and len(_row(subject, question).ids) + settings.max_new_tokens > limit:
        question = replace(question, history=question.history[2:])
    return question


def read_questions(path: Path) -> list[Question]:
    """Read `{"prompt": …, "image": …, "context": …}` lines; an image's path is relative to the file's folder.

    Raises:
        UserError: missing file, or every faulty line (the first 20 in words).
    """
    questions: list[Question] = []
    faults: list[str] = []
    for number, text in _lines(path):
        try:
            questions.append(_question(json.loads(text), path.parent))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    raise_faults(faults, 'A line is {"prompt": …}, with "image" and "context" where there are any.')
    if not questions:
        raise UserError(f"{path}: no questions in it")
    return questions


def text_or_file(value: str) -> str:
    """A text, or the content of the file of that name.

    Raises:
        UserError: a file that is not text.
    """
    try:
        return Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value
    except UnicodeDecodeError as error:
        raise UserError(f"{value}: not UTF-8: {error}") from None
    except OSError:  # no file's name: too long, or with a null character
        return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line


def _question(record: Any, folder: Path) -> Question:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(set(record) - {"prompt", "image", "context"}):
        raise ValueError(f"field {unknown[0]}: unknown")
    if wrong := next((name for name, value in record.items() if not isinstance(value, str)), ""):
        raise ValueError(f"field {wrong}: must be text, got {record[wrong]!r}")
    if "prompt" not in record:
        raise ValueError("field prompt: is missing")
    image = record.get("image", "")
    return Question(record["prompt"], folder / image if image else None, record.get("context", ""))


def _row(subject: Subject, question: Question) -> Row:
    config = subject.config
    if config.model.family == "paligemma":
        return _image_row(subject, question)
    if question.image:
        raise UserError(f"image {question.image}: this run's model reads text only")
    (row,) = subject.inputs.prompt_rows([_prompt(config, question)], None)
    return row


def _image_row(subject: Subject, question: Question) -> Row:
    if question.context:
        raise UserError("a context is for causal models; this run's model takes an image and a prompt")
    if question.image is None:
        raise UserError("this run's model looks at an image: name one")
    frame = frame_of(question.image, subject.config.data.frames)
    (row,) = subject.inputs.prompt_rows([question.prompt], open_image(question.image, frame))
    return row


def _prompt(config: Config, question: Question) -> str:
    template = config.data.prompt
    if question.context and template not in NAMED and "input" not in template_fields(template):
        raise UserError(f"data.prompt of this run, {template!r}, has no place for a context ({{input}})")
    facts: dict[str, Any] = {"instruction": question.prompt, "question": question.prompt, "input": question.context}
    if question.history:
        turns = json.loads(prompt_of(Example("question", "", question.prompt, "", facts=facts), template))
        facts = {"messages": [*question.history, *turns]}
    return prompt_of(Example("question", "", question.prompt, "", facts=facts), template)
