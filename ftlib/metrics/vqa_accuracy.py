"""VQA accuracy (VQAv2, VizWiz, OK-VQA): min(1, matching annotators / 3), averaged over leaving out one annotator.

The rule is that of the official program, github.com/GT-Vision-Lab/VQA at a013f00 (2021), PythonEvaluationTools,
including its quirks; paper: Antol et al., VQA: Visual Question Answering, ICCV 2015. Regular expressions, case and
white space are Python 3's (the program was written for Python 2, whose `\\d` matches only ASCII digits).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import numpy as np

from ftlib.metrics.base import GroupedSums, MetricResult, add_breakdown

RULE = "vqa-accuracy/a013f00"

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MARK = re.compile(f"[{re.escape(_PUNCTUATION)}]")
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The program passes re.UNICODE, which is 32, as the number of substitutions.
_PERIODS_REMOVED = 32

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"zero": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}

_ONE_APOSTROPHE = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't could've might've must've not've should've they've we've what've
    where've who've would've you've he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd how'll
    it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll there're they're what're why're
    you're he's how's somebody's someone's that's there's what's when's where's who's why's ma'am o'clock 'twas y'all
"""
_SEVERAL_APOSTROPHES = """
    couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've you'd've y'all'd've y'all'll 'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Word → its spelling with apostrophes.

    The key is the word without its apostrophe or, for a word with several, without one of them. The official table also
    has keys with capitals and keys that map to themselves; they can never change an answer.
    """
    found = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _SEVERAL_APOSTROPHES.split():
        found |= {word[:place] + word[place + 1 :]: word for place, sign in enumerate(word) if sign == "'"}
    return found | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def clean(text: str) -> str:
    """Replace line breaks and tabs by spaces and strip the ends; done for every answer."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Normalize punctuation, case, numbers, articles and contractions; done only if the annotators disagree.

    Args:
        text: a cleaned answer.
    """
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove a mark if it occurs next to a space, or if the text has a comma between digits; else make it a space.

    Periods are removed unless a digit follows.
    """
    if marks := set(_MARK.findall(text)):
        gone = _DIGITS_WITH_COMMA.search(text) is not None
        replaced: dict[str, str | int | None] = {
            mark: "" if gone or f"{mark} " in text or f" {mark}" in text else " " for mark in marks
        }
        text = text.translate(str.maketrans(replaced))
    return _PERIOD.sub("", text, count=_PERIODS_REMOVED) if "." in text else text


def leave_one_out(matches: int, people: int) -> float:
    """Accuracy of an answer that `matches` of the annotators gave: the mean over them of min(1, others / 3)."""
    return (matches * min(3, matches - 1) + (people - matches) * min(3, matches)) / (3 * people)


def accuracies(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Accuracy of every prediction, 0…1.

    Args:
        predictions: shape (n,).
        answers: of the annotators (usually ten, at least one) to each question, shape (n, people).
    """
    cleaned, normalized = _MemoizedFunction(clean), _MemoizedFunction(lambda text: normalize(clean(text)))
    found = []
    for prediction, given in zip(predictions, answers, strict=True):
        distinct = set(given)
        read = normalized if len({cleaned[answer] for answer in distinct}) > 1 else cleaned
        wanted = read[prediction]
        matches = sum(given.count(answer) for answer in distinct if read[answer] == wanted)
        found.append(leave_one_out(matches, len(given)))
    return found


class _MemoizedFunction(dict[str, str]):
    """A function of texts with cached results: the same few answers occur very often."""

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, text: str) -> str:
        value = self[text] = self._function(text)
        return value


def measure(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    images: Sequence[Hashable],
    kinds: Mapping[str, Sequence[str]] | None = None,
) -> MetricResult:
    """VQA accuracy in percent, resampled by image.

    Args:
        predictions: shape (n,).
        answers: of the annotators to each question, shape (n, people).
        images: the image of each question, shape (n,).
        kinds: name of a breakdown (`answer type`) → the kind of each question, shape (n,).
    """
    rows = accuracies(predictions, answers)
    sums = GroupedSums(images, scale=100)
    sums.add_ratio("accuracy", rows)
    for name, labels in (kinds or {}).items():
        add_breakdown(sums, name, _single(labels), np.array(rows))
    return MetricResult(RULE, "accuracy", "percent", sums, len(rows), rows)


def _single(labels: Sequence[str]) -> list[Collection[str]]:
    return [(label,) for label in labels]


MIN_VQA_ANSWERS = 4
"""With fewer annotators no answer can score 1: three others must have given it."""
