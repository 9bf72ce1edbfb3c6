"""Answers and thresholds from likelihoods, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from ftlib.errors import UserError
from ftlib.evaluation.threshold import Threshold, argmax_labels, choose_threshold, precision_recall, probabilities


def test_probabilities_are_a_softmax() -> None:
    shares = probabilities([[-1000.0, -1000.0 + np.log(3)], [0.0, 0.0]])
    assert shares == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))


@pytest.mark.parametrize("seed", range(20))
def test_curve_equals_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 8, size=30) / 8
    truth = draw.random(30) < scores + 0.2
    thresholds, precisions, recalls = precision_recall(scores, truth)
    theirs = precision_recall_curve(truth, scores)
    assert thresholds == pytest.approx(theirs[2][::-1])
    assert precisions == pytest.approx(theirs[0][:-1][::-1])
    assert recalls == pytest.approx(theirs[1][:-1][::-1])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("min_precision", [None, 0.8])
def test_threshold_is_the_best_of_all(seed: int, min_precision: float | None) -> None:
    draw = np.random.default_rng(seed)
    scores = draw.random(40)
    truth = draw.random(40) < scores**2
    scores[0], truth[0] = 1.0, True
    found = choose_threshold(scores, truth, min_precision, "valid")

    def merit(value: float) -> float:
        answered = scores >= value
        hits = (answered & truth).sum()
        precision, recall = hits / max(1, answered.sum()), hits / truth.sum()
        if min_precision is not None:
            return recall if precision >= min_precision else -1
        return 2 * precision * recall / max(1e-12, precision + recall)

    assert merit(found.value) == pytest.approx(max(merit(value) for value in scores))
    assert (scores >= found.value).sum() * found.precision == pytest.approx(((scores >= found.value) & truth).sum())


def test_threshold_decides_for_the_positive_label_only() -> None:
    shares = np.array([[0.2, 0.5, 0.3], [0.35, 0.5, 0.15], [0.8, 0.1, 0.1]])
    threshold = Threshold(0.3, "valid", "best F1", 1.0, 1.0)
    assert argmax_labels(shares, ["yes", "no", "maybe"], "yes", threshold) == ["no", "yes", "yes"]
    assert argmax_labels(shares, ["yes", "no", "maybe"], None, None) == ["no", "no", "yes"]
    high = Threshold(0.9, "valid", "best F1", 1.0, 1.0)
    assert argmax_labels(shares, ["yes", "no", "maybe"], "yes", high) == ["no", "no", "no"]


def test_what_cannot_be_reached_is_said() -> None:
    found = choose_threshold(np.array([0.9, 0.8]), np.array([False, True]), 0.9, "valid")
    assert found.rule == "never predicted: no threshold reaches precision 0.9, the best is 0.5000"
    assert argmax_labels(np.array([[1.0, 0.0]]), ["yes", "no"], "yes", found) == ["no"]
    with pytest.raises(UserError, match="no row of valid has the positive label"):
        choose_threshold(np.array([0.9]), np.array([False]), None, "valid")
