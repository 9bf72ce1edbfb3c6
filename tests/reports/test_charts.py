"""Ticks, scales, thinning and smoothing of charts."""

from __future__ import annotations

import re

import pytest

from ftlib.reports import charts


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 444, 5, [100, 200, 300, 400]),
        (0, 0.00105, 4, [0, 0.0005, 0.001]),
        (0, 9.7, 4, [0, 2.5, 5, 7.5]),
        (-3, 3, 5, [-2, 0, 2]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, about: int, expected: list[float]) -> None:
    assert charts.nice_ticks(low, high, about) == expected


def test_log_ticks() -> None:
    assert charts.log_ticks(0.0015, 7.5) == [0.01, 0.1, 1]
    assert charts.log_ticks(0.3, 25) == [0.5, 1, 2, 5, 10, 20]
    assert len(charts.log_ticks(1e-12, 1e3)) <= 7


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0, 1e-4, "0"), (5e-4, 5e-4, "5e-4"), (0.15, 0.05, "0.15"), (20000, 10000, "20,000"), (2e7, 1e7, "2e7")],
)
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert charts.tick_label(value, step) == text


def test_log_scale_is_for_wide_positive_ranges() -> None:
    assert charts.needs_log_scale([0.01, 1.0])
    assert not charts.needs_log_scale([0.5, 1.0])
    assert not charts.needs_log_scale([0.0, 1.0])


def test_scales_map_ends_to_ends() -> None:
    linear, log = charts.Scale(0, 10, 100, 200), charts.Scale(0.01, 1, 100, 200, log=True)
    assert (linear(0), linear(5), linear(10)) == (100, 150, 200)
    assert (log(0.01), log(0.1), log(1)) == pytest.approx((100, 150, 200))


def test_thinning_keeps_order_and_spikes() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_000)]
    points[6123] = (6123.0, 99.0)
    points[123] = (123.0, -99.0)
    thinned = charts.downsample(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert thinned == sorted(thinned)
    assert (6123.0, 99.0) in thinned
    assert (123.0, -99.0) in thinned
    assert charts.downsample(points[:800]) == points[:800]


def test_running_mean_keeps_a_line_a_line_and_quiets_noise() -> None:
    line = [float(value) for value in range(100)]
    assert charts.smooth(line)[2:-2] == pytest.approx(line[2:-2])
    noise = [float(value % 2) for value in range(100)]
    assert all(0.3 < value < 0.7 for value in charts.smooth(noise))


def test_a_long_run_stays_small() -> None:
    points = [(float(step), 1 + step % 3) for step in range(50_000)]
    chart = charts.line_chart("loss", points, [], noisy=True, width=600, height=300)
    curves = re.findall(r'<polyline points="([^"]*)"', chart)
    assert len(curves) == 2
    assert all(len(curve.split()) <= charts.MAX_POINTS for curve in curves)


def test_a_schedule_is_drawn_as_it_is() -> None:
    points = [(float(step), min(step, 50) * 1e-5) for step in range(100)]
    chart = charts.line_chart("learning rate", points, [], noisy=False, width=600, height=300)
    assert chart.count("<polyline") == 1


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(3.0, -1.0), (4.0, -2.0)]])
def test_odd_series_draw_inside_the_frame(points: list[charts.Point]) -> None:
    chart = charts.line_chart("t", points, [], noisy=True, width=400, height=200)
    numbers = [float(number) for number in re.findall(r'(?:cx|cy|y1|x1)="([^"]*)"', chart)]
    assert numbers
    assert all(0 <= number <= 400 for number in numbers)


def test_interval_bar_puts_dot_between_whisker_ends() -> None:
    bar = charts.interval_bar(0.5, 0.25, 0.75, "after", "half")
    assert 'cx="120.0"' in bar
    assert 'x1="64.0" x2="176.0"' in bar
    assert "<title>half</title>" in bar
