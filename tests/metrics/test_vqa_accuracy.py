"""VQA accuracy against a slow, literal reading of its rule."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ftlib.metrics.uncertainty import confidence_intervals
from ftlib.metrics.vqa_accuracy import CONTRACTIONS, accuracies, clean, leave_one_out, measure, normalize
from tests.metrics import literal_vqa

WORDS = [*literal_vqa.CONTRACTIONS, *literal_vqa.CONTRACTIONS.values(), *literal_vqa.NUMBERS]
WORDS += ["a", "An", "the", "THE", "red", "Blue", "10", "1,000", "3.5", ".5", "5.", "U.S.", "...", "." * 35]
WORDS += ["é", "ß", "İ", "ΑΣ", "٣", "٣,٤", "日本", "\u00a0", "\u2003", "\x1c"]
SIGNS = [*literal_vqa.PUNCTUATION, *".':$%&*#~ \t\n\r123x", " ", " ", ",", "."]


def text(draw: random.Random) -> str:
    return "".join(draw.choice(draw.choice([WORDS, SIGNS, [" "]])) for _ in range(draw.randrange(9)))


@pytest.mark.parametrize("seed", range(10))
def test_normalisation_equals_the_literal_one(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(2000):
        raw = text(draw)
        assert clean(raw) == literal_vqa.stripped(raw)
        assert normalize(raw) == literal_vqa.normalized(raw), repr(raw)


def test_every_entry_of_the_tables() -> None:
    for wrong, right in literal_vqa.CONTRACTIONS.items():
        assert normalize(wrong) == literal_vqa.in_words(wrong)
        if wrong == wrong.lower():
            assert normalize(wrong) == right
    assert set(CONTRACTIONS) <= set(literal_vqa.CONTRACTIONS)
    for word, digit in literal_vqa.NUMBERS.items():
        assert normalize(word.upper()) == digit


@pytest.mark.parametrize(
    ("raw", "normalized"),
    [
        ("black-and-white", "black and white"),
        ("black - and-white", "black andwhite"),
        ("1,000 -up/down", "1000 updown"),
        ("a,b", "b"),
        ("U.S.A.", "usa"),
        ("3.5.", "3.5"),
        ("a .5", ".5"),
        ("x" + "." * 34, "x.."),
        ("the man's", "man's"),
        ("None", "0"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("", ""),
    ],
)
def test_quirks(raw: str, normalized: str) -> None:
    assert normalize(raw) == normalized == literal_vqa.normalized(raw)


@pytest.mark.parametrize("seed", range(10))
def test_accuracy_equals_the_literal_one(seed: int) -> None:
    draw = random.Random(seed)
    predictions, answers = [], []
    for _ in range(300):
        few = [text(draw) for _ in range(draw.randint(1, 4))]
        answers.append([draw.choice(few) for _ in range(draw.choice([10, 10, 1, 2, 5]))])
        predictions.append(draw.choice([*few, text(draw), few[0].upper(), f" {few[0]}.\n"]))
    expected = [literal_vqa.accuracy(*row) for row in zip(predictions, answers, strict=True)]
    assert len(set(expected)) > 5
    assert accuracies(predictions, answers) == pytest.approx([float(one) for one in expected], abs=1e-15)


def test_answers_are_normalised_only_if_people_disagree() -> None:
    assert accuracies(["The dog."], [["The dog."] * 10]) == [1.0]
    assert accuracies(["dog"], [["The dog."] * 10]) == [0.0]
    assert accuracies(["dog"], [["The dog."] * 9 + ["cat"]]) == [1.0]
    assert accuracies(["dog"], [["dog\n"] * 5 + ["\tdog"] * 5]) == [1.0], "breaks and ends do not count as disagreement"


def test_leave_one_out_by_hand() -> None:
    assert [leave_one_out(matches, 10) for matches in range(5)] == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert leave_one_out(1, 1) == 0, "nobody is left who agrees"


def test_measured_values_rows_and_breakdowns() -> None:
    answers = [["yes"] * 10, ["2"] * 3 + ["3"] * 7, ["cat"] * 2 + ["dog"] * 8]
    kinds = {"answer type": ["yes/no", "number", "other"], "question type": ["is", "how many", "is"]}
    measured = measure(["yes", "2", "cat"], answers, [1, 1, 2], kinds)
    assert measured.rows == pytest.approx([1, 0.9, 0.6])
    assert measured.values() == pytest.approx(
        {
            "accuracy": 250 / 3,
            "answer type: number": 90,
            "answer type: other": 60,
            "answer type: yes/no": 100,
            "question type: how many": 90,
            "question type: is": 80,
        }
    )
    assert (measured.rule, measured.headline, measured.unit, measured.n) == (
        "vqa-accuracy/a013f00",
        "accuracy",
        "percent",
        3,
    )
    assert measured.sample.groups == [1, 2]


def test_questions_about_one_image_are_resampled_together() -> None:
    answers, images = [["yes"] * 10] * 400, [number // 10 for number in range(400)]
    predictions = ["yes" if image % 2 else "no" for image in images]
    low, high = confidence_intervals(measure(predictions, answers, images))["accuracy"] or (0, 0)
    margin = 1.96 * 100 * np.sqrt(0.25 / 40)
    assert (low, high) == pytest.approx((50 - margin, 50 + margin), abs=2)
