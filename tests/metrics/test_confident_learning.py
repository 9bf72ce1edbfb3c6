"""Labels flipped on purpose are found by the probabilities of a model that never saw them."""

from __future__ import annotations

import numpy as np
import pytest

from ftlib.metrics.confident_learning import find_label_issues


def test_the_joint_of_a_small_example_by_hand() -> None:
    """Thresholds: .6 for class 0 (mean of .9, .8, .1), .75 for class 1."""
    shares = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8]])
    found = find_label_issues(shares, np.array([0, 0, 0, 1, 1]))
    assert found.joint == pytest.approx(np.array([[2.0, 1.0], [0.0, 2.0]]))
    assert found.rows.tolist() == [2] and found.suggested.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_flipped_labels_are_found(seed: int, noise: float) -> None:
    """A model that is right in 96 % of cases, and less sure where it is wrong; classes of different sizes."""
    draw = np.random.default_rng(seed)
    rows, classes = 4000, 10
    truth = draw.choice(classes, rows, p=np.arange(1, 11) / 55)
    logits = draw.normal(0, 1, (rows, classes))
    logits[np.arange(rows), truth] += 3.8
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert 0.94 < (shares.argmax(axis=1) == truth).mean() < 0.98
    flipped = draw.random(rows) < noise
    given = np.where(flipped, (truth + draw.integers(1, classes, rows)) % classes, truth)
    found = find_label_issues(shares, given)
    assert found.joint.sum() == pytest.approx(rows)
    hits = flipped[found.rows].sum()
    if noise:
        assert hits / len(found.rows) >= 0.8 and hits / flipped.sum() >= 0.8
        assert (found.suggested[found.rows] == truth[found.rows]).mean() > 0.8
    else:
        assert len(found.rows) < 0.03 * rows


def test_a_class_without_rows_and_one_that_is_never_certain() -> None:
    shares = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.55, 0.45, 0.0]])
    found = find_label_issues(shares, np.array([0, 1, 1]))
    assert found.joint.sum() == pytest.approx(3) and set(found.rows.tolist()) <= {1, 2}
