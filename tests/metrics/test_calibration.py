"""Calibration error against a literal loop, and on models whose calibration is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ftlib.metrics.calibration import ADAPTIVE_ECE, ECE, calibration


def literal(confidences: list[float], right: list[bool], edges: list[float]) -> float:
    """Guo et al. 2017, equation 3: bins ((m − 1) / M, m / M]."""
    total = 0.0
    for low, high in itertools.pairwise(edges):
        rows = [i for i, c in enumerate(confidences) if low < c <= high or (low == edges[0] and c == low)]
        if rows:
            accuracy = sum(right[i] for i in rows) / len(rows)
            total += len(rows) * abs(accuracy - sum(confidences[i] for i in rows) / len(rows))
    return total / len(confidences)


@pytest.mark.parametrize("seed", range(5))
def test_errors_are_those_of_the_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    confidences = [0.0, 0.2, 1.0, 1.0, *draw.random(196).round(3).tolist()]
    right = (draw.random(200) < 0.7).tolist()
    found = calibration(confidences, right)
    assert found.errors[ECE][0] == pytest.approx(literal(confidences, right, np.linspace(0, 1, 16).tolist()))
    quantiles = np.quantile(confidences, np.linspace(0, 1, 16)).tolist()
    assert found.errors[ADAPTIVE_ECE][0] == pytest.approx(literal(confidences, right, quantiles))
    assert sum(one.n for one in found.bins) == found.n == 200
    for one in found.bins:
        assert one.low <= one.confidence <= one.high
        assert one.interval and one.interval[0] <= one.accuracy <= one.interval[1]


def test_a_calibrated_model_and_one_that_is_too_sure() -> None:
    draw = np.random.default_rng(1)
    shares = draw.uniform(0.3, 1, 3000)
    right = (draw.random(3000) < shares).tolist()
    calibrated, sure = calibration(shares.tolist(), right), calibration((1 - (1 - shares) / 4).tolist(), right)
    assert calibrated.errors[ECE][0] < calibrated.expected[1] < 0.05, "above 0 all the same"
    value, interval = sure.errors[ECE]
    assert interval and calibrated.expected[1] < interval[0] < value < interval[1]
    assert value == pytest.approx(sure.confidence - sure.accuracy, abs=1e-3)


def test_rows_of_one_image_are_no_independent_evidence() -> None:
    draw = np.random.default_rng(2)
    shares = draw.uniform(0.5, 1, 100)
    right = draw.random(100) < 0.6
    once = calibration(shares.tolist(), right.tolist())
    groups = [image for image in range(100) for _ in range(4)]
    several = calibration(shares.repeat(4).tolist(), right.repeat(4).tolist(), groups)
    assert several.errors[ECE][0] == pytest.approx(once.errors[ECE][0])
    assert several.errors[ECE][1] == pytest.approx(once.errors[ECE][1], abs=1e-6)


@pytest.mark.parametrize("confidences", [[1.0], [0.0, 0.0], [1.0] * 40])
def test_few_rows_and_equal_confidences(confidences: list[float]) -> None:
    found = calibration(confidences, [True] * len(confidences))
    assert found.errors[ECE][0] == pytest.approx(1 - confidences[0]) and len(found.bins) == 1
