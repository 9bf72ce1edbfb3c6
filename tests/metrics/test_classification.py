"""Classification scores against scikit-learn."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from ftlib.metrics.classification import INVALID, measure
from ftlib.metrics.uncertainty import confidence_intervals, wilson

LABELS = ["a", "b", "c", "never"]


def random_rows(seed: int) -> tuple[list[str], list[str]]:
    """References without `never`, sometimes without `c`; answers with it and with answers that are no label."""
    draw = random.Random(seed)
    references = [draw.choice("abc" if seed % 3 else "ab") for _ in range(50)]
    answers = [draw.choice([reference, "a", "c", "never", "x", ""]) for reference in references]
    return answers, references


def cleaned(answers: list[str]) -> list[str]:
    return [answer if answer in LABELS else INVALID for answer in answers]


def their_scores(answers: list[str], references: list[str], average: str | None, labels: list[str]) -> list[float]:
    """Precision, recall and F1 as scikit-learn has them (by class, if `average` is None)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = precision_recall_fscore_support(
            references, cleaned(answers), labels=labels, average=average, zero_division=0
        )
    return list(found[:3])


@pytest.mark.parametrize("seed", range(20))
def test_averages_equal_scikit_learn(seed: int) -> None:
    answers, references = random_rows(seed)
    values = measure(answers, references, LABELS).values()
    assert values["accuracy"] == pytest.approx(accuracy_score(references, cleaned(answers)), abs=1e-15)
    for average in ("macro", "weighted"):
        ours = [values[f"{average} {name}"] for name in ("precision", "recall", "F1")]
        theirs = their_scores(answers, references, average, sorted(set(references)))
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_classes_and_confusion_equal_scikit_learn(seed: int) -> None:
    answers, references = random_rows(seed)
    measured = measure(answers, references, LABELS)
    theirs = their_scores(answers, references, None, LABELS)
    for index, label in enumerate(LABELS):
        ours = measured.tables["classes"][label]
        expected = [column[index] for column in theirs]  # type: ignore[index]
        assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx(expected, abs=1e-12)
        assert ours["support"] == references.count(label)
    matrix = confusion_matrix(references, cleaned(answers), labels=[*LABELS, INVALID])[: len(LABELS)]
    assert measured.tables["confusion"] == matrix.tolist()
    assert (measured.tables["labels"], measured.tables["columns"]) == (LABELS, [*LABELS, INVALID])
    assert measured.invalid == sum(answer in ("x", "") for answer in answers)
    assert measured.rows == [float(a == r) for a, r in zip(answers, references, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_a_positive_label_against_all_others(seed: int) -> None:
    answers, references = random_rows(seed)
    measured = measure(answers, references, LABELS, positive="a")
    values, table = measured.values(), measured.tables["positive"]
    asked, answered = [r == "a" for r in references], [a == "a" for a in answers]
    theirs = precision_recall_fscore_support(asked, answered, average="binary", zero_division=0)
    assert [values["precision"], values["recall"], values["F1"]] == pytest.approx(theirs[:3], abs=1e-12)
    tn, fp, fn, tp = confusion_matrix(asked, answered).ravel()
    assert table == {"label": "a", "tp": tp, "tn": tn, "fp": fp, "fn": fn}


def test_an_invalid_answer_is_wrong_and_no_positive() -> None:
    measured = measure(["a", "huh", "huh"], ["a", "a", "b"], ["a", "b"], positive="a")
    values = measured.values()
    assert (values["accuracy"], values["precision"], values["recall"]) == pytest.approx((1 / 3, 1, 1 / 2))
    assert measured.invalid == 2
    assert measured.tables["positive"] == {"label": "a", "tp": 1, "tn": 1, "fp": 0, "fn": 1}
    assert measured.tables["classes"]["a"]["recall"] == 0.5


def test_never_answered_and_never_asked() -> None:
    values = measure(["b", "b"], ["a", "b"], ["a", "b"], positive="a").values()
    assert (values["precision"], values["recall"], values["F1"]) == (0, 0, 0)
    values = measure(["b", "b"], ["b", "b"], ["a", "b"], positive="a").values()
    assert np.isnan(values["recall"]) and np.isnan(values["F1"]) and values["macro F1"] == 1


def test_a_weight_is_a_number_of_copies_of_all_rows_of_an_image() -> None:
    answers, references = random_rows(1)
    images = [f"image {n // 4}" for n in range(50)]
    measured = measure(answers, references, LABELS, images, positive="b")
    weights = np.random.default_rng(0).integers(0, 4, size=len(measured.sample.groups)).astype(float)
    times = dict(zip(measured.sample.groups, weights, strict=True))
    copies = [n for n, image in enumerate(images) for _ in range(int(times[image]))]
    copied = measure([answers[n] for n in copies], [references[n] for n in copies], LABELS, positive="b")
    weighted = measured.sample.values(weights[None])
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(copied.values(), abs=1e-12)


def test_intervals_hold_the_values() -> None:
    answers, references = random_rows(2)
    measured = measure(answers, references, LABELS, positive="a")
    found, values = confidence_intervals(measured), measured.values()
    for name, interval in found.items():
        assert interval and interval[0] < values[name] < interval[1], name
    table = measured.tables["positive"]
    assert found["precision"] == wilson(table["tp"], table["tp"] + table["fp"])


def test_a_reference_or_a_positive_label_that_is_no_label_is_refused() -> None:
    with pytest.raises(ValueError, match="'z'"):
        measure(["a"], ["z"], ["a"])
    with pytest.raises(ValueError, match="'z'"):
        measure(["a"], ["a"], ["a"], positive="z")
