"""Tasks: how an answer is read and which metrics judge it. A new task is a few lines in `TASKS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.metrics import classification


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        headline: the metric that stands for all others in tables.
        parse: generated text → answer.
        score_row: (answer, references) → the row's own score in 0…1.
        summarize: (answers, references, labels) → metric name → value, tables included.
    """

    headline: str
    parse: Callable[[str], str]
    score_row: Callable[[str, Sequence[str]], float]
    summarize: Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, Any]]


TASKS: dict[str, Task] = {
    "classify": Task(
        headline="accuracy",
        parse=str.strip,
        score_row=lambda answer, references: float(answer in references),
        summarize=classification.summarize,
    ),
}
