"""GQA's metrics: accuracy, consistency, validity, plausibility and the distribution of answers.

The rules are those of the official eval.py (Hudson and Manning, GQA, CVPR 2019). An answer is right if it is the very
same text. Only balanced questions count; the others serve consistency alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftlib.metrics.breakdown import add_breakdown
from ftlib.metrics.totals import Array, Measured, Totals

RULE = "gqa/1.2"
_NO_STEP = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")


@dataclass(frozen=True, slots=True)
class Question:
    """What the metrics look at.

    Attributes:
        entailed: ids of the questions whose answers follow from this one's; its own may be among them.
        group: the global group, whose answers' distribution is compared; None if the question is in none.
        structural, semantic, detailed: its types.
        steps: see `count_steps`.
    """

    question: str
    answer: str
    image: str
    balanced: bool
    entailed: tuple[str, ...]
    group: str | None
    structural: str
    semantic: str
    detailed: str
    steps: int


@dataclass(frozen=True, slots=True)
class Choices:
    """The answers that a question could have at all, and those that the world makes likely."""

    valid: tuple[str, ...]
    plausible: tuple[str, ...]


def count_steps(program: Iterable[tuple[str, str]]) -> int:
    """Number of reasoning steps of a question's program of (operation, argument).

    Steps that only put the question (existence, names) are left out: those in whose "operation: argument" one of the
    official words stands, wherever.
    """
    return sum(not any(word in f"{operation}: {argument}" for word in _NO_STEP) for operation, argument in program)


def measure(
    questions: Mapping[str, Question], predictions: Mapping[str, str], choices: Mapping[str, Choices] | None = None
) -> Measured:
    """All metrics in percent, resampled by image; `distribution` is a plain number, lower is better.

    Args:
        questions: id → question, balanced and other.
        predictions: id → answer, for every balanced question; for all questions if consistency is wanted.
        choices: id → choices, for every balanced question; needed for validity and plausibility.
    """
    balanced = {key: question for key, question in questions.items() if question.balanced}
    rows = [float(predictions[key] == question.answer) for key, question in balanced.items()]
    totals = Totals([question.image for question in balanced.values()], scale=100)
    notes = {"grounding": "needs the model's attention maps"}
    _add_accuracies(totals, list(balanced.values()), np.array(rows))
    if reason := _no_consistency(questions, predictions):
        notes["consistency"] = reason
    else:
        _add_consistency(totals, questions, predictions, balanced)
    if choices is None:
        notes |= dict.fromkeys(("validity", "plausibility"), "needs the choices file (--choices)")
    else:
        _add_choices(totals, balanced, predictions, choices)
    distribution = _distribution(balanced, predictions)
    if np.isnan(distribution):
        notes["distribution"] = "no question belongs to a global group"
    constants = {"distribution": distribution}
    return Measured(RULE, "accuracy", "percent", totals, len(rows), rows, constants=constants, notes=notes)


def _add_accuracies(totals: Totals, questions: Sequence[Question], scores: Array) -> None:
    is_open = np.array([question.structural == "query" for question in questions], dtype=float)
    totals.ratio("accuracy", scores)
    totals.ratio("binary", scores * (1 - is_open), 1 - is_open)
    totals.ratio("open", scores * is_open, is_open)
    labels: dict[str, list[str] | list[int]] = {
        "structural type": [question.structural for question in questions],
        "semantic type": [question.semantic for question in questions],
        "steps": [question.steps for question in questions],
        "words": [len(question.question.split()) for question in questions],
    }
    for name, column in labels.items():
        add_breakdown(totals, name, [(label,) for label in column], scores)


def _no_consistency(questions: Mapping[str, Question], predictions: Mapping[str, str]) -> str | None:
    """Why consistency cannot be computed, if so: the official program wants everything answered."""
    needed = {other for question in questions.values() if question.balanced for other in question.entailed}
    if absent := len(needed - questions.keys()):
        return f"needs the file of all questions: {absent} entailed questions are not in this one"
    if open_ones := sum(key not in predictions for key in questions):
        return f"needs an answer to every question, balanced or not: {open_ones} have none"
    return None


def _add_consistency(
    totals: Totals, questions: Mapping[str, Question], predictions: Mapping[str, str], balanced: Mapping[str, Question]
) -> None:
    """Mean over the rightly answered questions that entail others of the share of those that are right too."""
    shares, counted = np.zeros(len(balanced)), np.zeros(len(balanced))
    for row, (key, question) in enumerate(balanced.items()):
        others = [other for other in question.entailed if other != key]
        if others and predictions[key] == question.answer:
            shares[row] = np.mean([predictions[other] == questions[other].answer for other in others])
            counted[row] = 1
    totals.ratio("consistency", shares, counted)


def _add_choices(
    totals: Totals, balanced: Mapping[str, Question], predictions: Mapping[str, str], choices: Mapping[str, Choices]
) -> None:
    """Questions about what two things have in common take three answers only, whatever the file says."""
    valid, plausible = [], []
    for key, question in balanced.items():
        common = "Common" in question.detailed
        valid.append(predictions[key] in (_COMMON if common else choices[key].valid))
        plausible.append(predictions[key] in (_COMMON if common else choices[key].plausible))
    totals.ratio("validity", valid)
    totals.ratio("plausibility", plausible)


def _distribution(balanced: Mapping[str, Question], predictions: Mapping[str, str]) -> float:
    """Chi-square of predicted against true answers in each global group, averaged by the groups' sizes, / 100.

    Answers that are nowhere true in a group are not looked at. NaN if no question has a group. It adds up squared
    counting noise, and a resample adds the same noise once more: its bootstrap interval would lie wholly above the
    value itself, so it has none.
    """
    true: defaultdict[str, Counter[str]] = defaultdict(Counter)
    predicted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for key, question in balanced.items():
        if question.group is not None:
            true[question.group][question.answer] += 1
            predicted[question.group][predictions[key]] += 1
    weighted = sum(
        counts.total() * sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in true.items()
    )
    size = sum(counts.total() for counts in true.values())
    return weighted / size / 100 if size else float("nan")
