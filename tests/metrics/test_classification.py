"""Classification scores against scikit-learn, and intervals."""

import random

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from ftlib.metrics.bootstrap import mean_interval
from ftlib.metrics.classification import INVALID, summarize

LABELS = ["a", "b", "c", "never"]


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_scikit_learn(seed: int) -> None:
    draw = random.Random(seed)
    references = [draw.choice("abc") for _ in range(50)]
    answers = [draw.choice(["a", "b", "c", "x", ""]) for _ in references]
    scores = summarize(answers, references, LABELS)
    cleaned = [answer if answer in LABELS else INVALID for answer in answers]
    assert scores["accuracy"] == pytest.approx(accuracy_score(references, cleaned), abs=1e-15)
    theirs = precision_recall_fscore_support(references, cleaned, labels=LABELS, zero_division=0)
    for index, label in enumerate(LABELS):
        ours = scores["classes"][label]
        expected = [column[index] for column in theirs]
        assert [ours["precision"], ours["recall"], ours["f1"], ours["support"]] == pytest.approx(expected, abs=1e-15)
    matrix = confusion_matrix(references, cleaned, labels=[*LABELS, INVALID])[: len(LABELS)]
    assert scores["confusion"] == matrix.tolist()
    assert scores["invalid"] == sum(answer in ("x", "") for answer in answers)
    present = [scores["classes"][label]["f1"] for label in "abc"]
    assert scores["macro_f1"] == pytest.approx(sum(present) / 3)


def test_an_answer_that_is_no_label_counts_against_its_class() -> None:
    scores = summarize(["a", "huh"], ["a", "a"], ["a", "b"])
    assert (scores["accuracy"], scores["invalid"], scores["classes"]["a"]["recall"]) == (0.5, 1, 0.5)


def test_interval_is_the_binomial_one_for_large_n() -> None:
    low, high = mean_interval([1.0] * 800 + [0.0] * 200)
    margin = 1.96 * (0.8 * 0.2 / 1000) ** 0.5
    assert low == pytest.approx(0.8 - margin, abs=0.002)
    assert high == pytest.approx(0.8 + margin, abs=0.002)
    assert mean_interval([1.0, 0.0] * 20) == mean_interval([1.0, 0.0] * 20)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(100):
        low, high = mean_interval([float(draw.random() < 0.7) for _ in range(60)])
        hits += low <= 0.7 <= high
    assert 88 <= hits <= 99
