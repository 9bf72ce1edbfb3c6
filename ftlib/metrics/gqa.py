"""GQA's metrics: accuracy, consistency, validity, plausibility and the distribution of answers.

The rules are those of the official eval.py (Hudson and Manning, GQA, CVPR 2019). An answer is right if it equals the
reference exactly. Only balanced questions count; the others are used for consistency only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftlib.metrics.base import Array, GroupedSums, MetricResult, add_breakdown

RULE = "gqa/1.2"
_NO_STEP = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")


@dataclass(frozen=True, slots=True)
class GqaQuestion:
    """The fields of a question that the metrics use.

    Attributes:
        entailed: ids of the questions whose answers follow from this one's; may include itself.
        group: the global group for the distribution of answers; None without one.
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
class GqaChoices:
    """The valid answers of a question, and the plausible ones."""

    valid: tuple[str, ...]
    plausible: tuple[str, ...]


def count_steps(program: Iterable[tuple[str, str]]) -> int:
    """Number of reasoning steps of a question's program of (operation, argument).

    Steps that only ask the question (existence, names) are not counted: those whose "operation: argument" contains one
    of the official words anywhere.
    """
    return sum(not any(word in f"{operation}: {argument}" for word in _NO_STEP) for operation, argument in program)


def measure(
    questions: Mapping[str, GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, GqaChoices] | None = None,
) -> MetricResult:
    """All metrics in percent, resampled by image; `distribution` is a plain number, lower is better.

    Args:
        questions: id → question, balanced or not.
        predictions: id → answer, for every balanced question; consistency needs those of all questions.
        choices: id → choices, for every balanced question; needed for validity and plausibility.
    """
    balanced = {key: question for key, question in questions.items() if question.balanced}
    rows = [float(predictions[key] == question.answer) for key, question in balanced.items()]
    sums = GroupedSums([question.image for question in balanced.values()], scale=100)
    notes = {"grounding": "needs the model's attention maps"}
    _add_accuracies(sums, list(balanced.values()), np.array(rows))
    if reason := _no_consistency(questions, predictions):
        notes["consistency"] = reason
    else:
        _add_consistency(sums, questions, predictions, balanced)
    if choices is None:
        notes |= dict.fromkeys(("validity", "plausibility"), "needs the choices file (--choices)")
    else:
        _add_choices(sums, balanced, predictions, choices)
    distribution = _distribution(balanced, predictions)
    if np.isnan(distribution):
        notes["distribution"] = "no question belongs to a global group"
    constants = {"distribution": distribution}
    return MetricResult(RULE, "accuracy", "percent", sums, len(rows), rows, constants=constants, notes=notes)


def _add_accuracies(sums: GroupedSums, questions: Sequence[GqaQuestion], scores: Array) -> None:
    is_open = np.array([question.structural == "query" for question in questions], dtype=float)
    sums.add_ratio("accuracy", scores)
    sums.add_ratio("binary", scores * (1 - is_open), 1 - is_open)
    sums.add_ratio("open", scores * is_open, is_open)
    labels: dict[str, list[str] | list[int]] = {
        "structural type": [question.structural for question in questions],
        "semantic type": [question.semantic for question in questions],
        "steps": [question.steps for question in questions],
        "words": [len(question.question.split()) for question in questions],
    }
    for name, column in labels.items():
        add_breakdown(sums, name, [(label,) for label in column], scores)


def _no_consistency(questions: Mapping[str, GqaQuestion], predictions: Mapping[str, str]) -> str | None:
    """Why consistency cannot be computed; None if it can. The official program needs an answer to every question."""
    needed = {other for question in questions.values() if question.balanced for other in question.entailed}
    if absent := len(needed - questions.keys()):
        return f"needs the file of all questions: {absent} entailed questions are not in this one"
    if open_ones := sum(key not in predictions for key in questions):
        return f"needs an answer to every question, balanced or not: {open_ones} have none"
    return None


def _add_consistency(
    sums: GroupedSums,
    questions: Mapping[str, GqaQuestion],
    predictions: Mapping[str, str],
    balanced: Mapping[str, GqaQuestion],
) -> None:
    """The mean share of correct entailed questions, over the correctly answered questions that entail any."""
    shares, counted = np.zeros(len(balanced)), np.zeros(len(balanced))
    for row, (key, question) in enumerate(balanced.items()):
        others = [other for other in question.entailed if other != key]
        if others and predictions[key] == question.answer:
            shares[row] = np.mean([predictions[other] == questions[other].answer for other in others])
            counted[row] = 1
    sums.add_ratio("consistency", shares, counted)


def _add_choices(
    sums: GroupedSums,
    balanced: Mapping[str, GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, GqaChoices],
) -> None:
    """Questions of the type "common" have three valid answers, whatever the choices file says."""
    valid, plausible = [], []
    for key, question in balanced.items():
        common = "Common" in question.detailed
        valid.append(predictions[key] in (_COMMON if common else choices[key].valid))
        plausible.append(predictions[key] in (_COMMON if common else choices[key].plausible))
    sums.add_ratio("validity", valid)
    sums.add_ratio("plausibility", plausible)


def _distribution(balanced: Mapping[str, GqaQuestion], predictions: Mapping[str, str]) -> float:
    """Chi-square of predicted against true answers in each global group, averaged by the groups' sizes, / 100.

    Answers that are never correct in a group are ignored. NaN if no question has a group. The value contains squared
    counting noise, and resampling adds the same noise again: a bootstrap interval would be entirely above the value, so
    there is none.
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
