"""Intervals and the paired test: against scipy, against literal loops, and whether they keep what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from ftlib.metrics.base import GroupedSums, MetricResult
from ftlib.metrics.uncertainty import confidence_intervals, paired_test, wilson


def measured(totals: GroupedSums) -> MetricResult:
    return MetricResult("test/1", "score", "fraction", totals, 0)


def means(scores: list[float], groups: list[object] | None = None) -> GroupedSums:
    totals = GroupedSums(groups or list(range(len(scores))))
    totals.add_ratio("score", scores)
    return totals


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 10), (7, 10), (10, 10), (359, 359), (348, 359)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_share_of_single_rows_gets_an_honest_interval() -> None:
    """A bootstrap of ten right answers has no width."""
    low, high = confidence_intervals(measured(means([1.0] * 10)))["score"] or (0, 0)
    assert low == pytest.approx(0.722, abs=0.001) and high == 1.0


def test_rows_of_one_image_are_no_independent_evidence() -> None:
    """Five questions about each image, all right or all wrong: as wide as for the images alone, not for the rows."""
    scores = [float(image % 10 < 7) for image in range(200)]
    alone = confidence_intervals(measured(means([score + 1e-9 for score in scores])))["score"]
    groups = [image for image in range(200) for _ in range(5)]
    five = confidence_intervals(measured(means([score + 1e-9 for score in scores for _ in range(5)], groups)))["score"]
    assert five == pytest.approx(alone, abs=1e-6)
    rows = confidence_intervals(measured(means([score + 1e-9 for score in scores for _ in range(5)])))["score"]
    assert alone and rows and (rows[1] - rows[0]) < 0.6 * (alone[1] - alone[0])


def test_a_ratio_is_computed_anew_in_every_resample() -> None:
    """Not the mean of the groups' ratios: big groups weigh more."""
    totals = GroupedSums(["a", "a", "a", "b"])
    totals.add_ratio("score", [1, 1, 1, 0])
    weights = np.array([[2.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    assert totals.values(weights)["score"] == pytest.approx([6 / 7, 0, 3 / 4])


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    draw = np.random.default_rng(0)
    found = [confidence_intervals(measured(means(list(draw.normal(0.3, 1, size=60)))))["score"] for _ in range(200)]
    hits = sum(low <= 0.3 <= high for low, high in found if low is not None)
    assert 180 <= hits <= 198


def test_a_metric_without_rows_has_no_interval() -> None:
    totals = means([1.0, 0.5])
    totals.add_ratio("none of these", [0, 0], [0, 0])
    assert confidence_intervals(measured(totals))["none of these"] is None
    assert np.isnan(measured(totals).values()["none of these"])


def literal_p(a: list[float], b: list[float]) -> float:
    """Every exchange of every pair, written out."""
    observed = abs(sum(b) - sum(a))
    gaps = []
    for flips in itertools.product((False, True), repeat=len(a)):
        left = [y if flip else x for x, y, flip in zip(a, b, flips, strict=True)]
        right = [x if flip else y for x, y, flip in zip(a, b, flips, strict=True)]
        gaps.append(abs(sum(right) - sum(left)))
    return sum(gap >= observed - 1e-9 for gap in gaps) / len(gaps)


@pytest.mark.parametrize("seed", range(10))
def test_few_rows_are_tested_exactly(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = (list((draw.random(9) < share).astype(float)) for share in (0.3, 0.8))
    found = paired_test(means(a), means(b), "score")
    assert found.p == pytest.approx(literal_p(a, b))
    assert found.difference == pytest.approx((sum(b) - sum(a)) / 9)


def test_equal_systems_are_told_apart_in_five_of_hundred_cases() -> None:
    draw = np.random.default_rng(1)
    ps = np.array(
        [paired_test(means(list(draw.random(50))), means(list(draw.random(50))), "score").p for _ in range(300)]
    )
    assert 0.02 <= (ps < 0.05).mean() <= 0.09
    assert (ps < 0.5).mean() == pytest.approx(0.5, abs=0.1)


def test_a_real_difference_is_found_and_noise_is_called_noise() -> None:
    draw = np.random.default_rng(2)
    base = draw.random(200)
    better = paired_test(means(list(base)), means(list(base + 0.05 + 0.05 * draw.normal(size=200))), "score")
    assert better.verdict == "real" and better.interval[0] > 0.03
    same = paired_test(means(list(base)), means(list(base + 0.05 * draw.normal(size=200))), "score")
    assert same.verdict == "noise"
    few = paired_test(means([1.0, 0.0, 1.0]), means([1.0, 1.0, 1.0]), "score")
    assert few.verdict == "noise (only 3 independent rows)"


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="not asked the same rows"):
        paired_test(means([1.0], ["a"]), means([1.0], ["b"]), "score")
