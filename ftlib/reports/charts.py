"""Line charts and interval bars as inline SVG. Colours are set in report.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MAX_POINTS, OVERLAY_POINTS = 800, 200
WIDE_RANGE = 50.0
SMOOTH_FROM = 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 28, 14, 34
_BAR_WIDTH, _BAR_HEIGHT, _BAR_MARGIN = 240, 22, 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps values between `low` and `high` to coordinates between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(number) if self.log else number for number in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Return round values for axis labels."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, about)


def needs_log_scale(values: Sequence[float]) -> bool:
    """Whether the range of values needs a log axis, because a linear one would hide small values."""
    return min(values) > 0 and max(values) / min(values) >= WIDE_RANGE


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return multiples of 1, 2, 2.5 or 5 × a power of ten between two values, at most about + 1."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two positive values, at most seven; with their 2- and 5-fold if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**power for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(decades) >= 3:
        return decades[:: math.ceil(len(decades) / 7)]
    candidates = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [value for value in candidates if low <= value <= high]


def tick_label(value: float, step: float) -> str:
    """Return a short number; with an exponent if the distance between ticks is below a thousandth."""
    if value == 0 or 1e-3 <= step < 1e6:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most `limit` points: the lowest and highest of each interval, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    stretches = limit // 2
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def smooth_window(count: int) -> int:
    """Return the number of neighbours on each side for the running mean of `count` points; 0 if there are too few."""
    return max(2, count // 50) if count >= SMOOTH_FROM else 0


def smooth(values: Sequence[float]) -> list[float]:
    """Return a centred running mean; near the ends it uses the available neighbours."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    reach = smooth_window(len(values))
    means = []
    for index in range(len(values)):
        first, end = max(0, index - reach), min(len(values), index + reach + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def line_chart(
    title: str,
    points: Sequence[Point],
    marks: Sequence[float],
    noisy: bool,
    width: int,
    height: int,
    second: Sequence[Point] = (),
) -> Markup:
    """Return a curve with axes and vertical marks.

    Args:
        title: for screen readers.
        points: (step, value), at least one; steps ascend.
        marks: steps with a vertical mark.
        noisy: draw a running mean over the values (on a log axis: of their logarithms), and use a log axis for a wide
            range. Not for exact curves such as a schedule.
        second: a second curve of few points, each of which is drawn.
    """
    x = _step_scale([step for step, _ in (*points, *second)], _LEFT, width - _RIGHT)
    values = [value for _, value in (*points, *second)]
    y = _value_scale(values, height - _BOTTOM, _TOP, log=noisy and needs_log_scale(values))
    shown = [mark for mark in marks if x.low <= mark <= x.high]
    marked = [_mark(x(mark), height) for mark in shown]
    curves = _curves([(x(step), y(value)) for step, value in points], noisy)
    curves += _dotted([(x(step), y(value)) for step, value in second])
    return _svg(title, width, height, _horizontal_axis(x, height), _vertical_axis(y, width), *marked, *curves)


def unit_chart(title: str, points: Sequence[Point], width: int, height: int) -> Markup:
    """Return a curve with both axes from 0 to 1.

    Args:
        points: (x, y), at least one; x ascends.
    """
    x = Scale(0, 1, _LEFT, width - _RIGHT)
    y = Scale(0, 1, height - _BOTTOM, _TOP)
    labels = [_text(tick_label(tick, 1), x(tick), height - _BOTTOM + 20, "middle") for tick in (0, 0.5, 1)]
    curves = _curves([(x(one), y(other)) for one, other in points], noisy=False)
    return _svg(title, width, height, *labels, _vertical_axis(y, width), *curves)


@dataclass(frozen=True)
class ReliabilityPoint:
    """A bin of a reliability diagram: edges, its share of the rows, mean confidence, accuracy with its interval."""

    low: float
    high: float
    share: float
    confidence: float
    accuracy: float
    interval: tuple[float, float] | None


def reliability_chart(title: str, points: Sequence[ReliabilityPoint], width: int, height: int) -> Markup:
    """Return accuracy over confidence with intervals, the diagonal of perfect calibration, and the shares of rows.

    Args:
        points: at least one; a bin's bar is its share of the rows.
    """
    x = Scale(0, 1, _LEFT, width - _RIGHT)
    y = Scale(0, 1, height - _BOTTOM, _TOP)
    base = height - _BOTTOM
    labels = [_text(tick_label(tick, 1), x(tick), base + 20, "middle") for tick in (0, 0.5, 1)]
    parts = []
    for point in points:
        top = y(point.share)
        bar = {"x": f"{x(point.low) + 1:.1f}", "width": f"{x(point.high) - x(point.low) - 2:.1f}"}
        parts.append(_element("rect", y=f"{top:.1f}", height=f"{base - top:.1f}", class_="share", **bar))
    ends = {"x1": f"{x(0):.1f}", "y1": f"{y(0):.1f}", "x2": f"{x(1):.1f}", "y2": f"{y(1):.1f}"}
    parts.append(_element("line", class_="diagonal", **ends))
    for point in points:
        at = f"{x(point.confidence):.1f}"
        if point.interval:
            low, high = (f"{y(edge):.1f}" for edge in point.interval)
            parts.append(_element("line", x1=at, x2=at, y1=low, y2=high, class_="whisker"))
        dot = _element("circle", cx=at, cy=f"{y(point.accuracy):.1f}", r=3.6, class_="dot")
        parts.append(dot)
    return _svg(title, width, height, *labels, _vertical_axis(y, width), *parts)


def overlay_chart(title: str, curves: Sequence[tuple[int, Sequence[Point]]], width: int, height: int) -> Markup:
    """Return several noisy curves in one chart, each as its running mean.

    Args:
        curves: (number of the colour, points); at least one point each, steps ascend.
    """
    means = [(colour, [step for step, _ in points], smooth([y for _, y in points])) for colour, points in curves]
    values = [value for _, _, line in means for value in line]
    x = _step_scale([step for _, steps, _ in means for step in steps], _LEFT, width - _RIGHT)
    y = _value_scale(values, height - _BOTTOM, _TOP, log=needs_log_scale(values))
    lines = []
    for colour, steps, line in means:
        positions = [(x(step), y(value)) for step, value in zip(steps, line, strict=True)]
        lines.append(_polyline(positions, f"of-{colour}", OVERLAY_POINTS))
    return _svg(title, width, height, _horizontal_axis(x, height), _vertical_axis(y, width), *lines)


def _svg(title: str, width: int, height: int, *parts: Markup) -> Markup:
    box = f"0 0 {width} {height}"
    return _element("svg", _element("title", title), *parts, viewBox=box, class_="chart", role="img")


def _step_scale(steps: Sequence[float], start: float, end: float) -> Scale:
    """Return the step axis, which starts at 0 unless the log starts much later."""
    low, high = min(steps), max(steps)
    return Scale(0 if low <= high / 10 else low, high if high > low else low + 1, start, end)


def _value_scale(values: Sequence[float], start: float, end: float, log: bool) -> Scale:
    """Return the value axis with some space at the top; a linear axis starts at 0."""
    if log:
        return Scale(min(values) / 1.2, max(values) * 1.2, start, end, log=True)
    low, high = min(0.0, *values), max(0.0, *values)
    return Scale(low, high + (high - low or 1) * 0.05, start, end)


def _horizontal_axis(x: Scale, height: int) -> Markup:
    ticks = x.ticks(5)
    base = height - _BOTTOM
    labels = [_text(tick_label(tick, 1), x(tick), base + 20, "middle") for tick in ticks if tick == int(tick)]
    axis = _element("line", x1=_LEFT, x2=f"{x.end:g}", y1=base, y2=base, class_="axis")
    return _join(axis, *labels)


def _vertical_axis(y: Scale, width: int) -> Markup:
    ticks = y.ticks(4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 and not y.log else 0
    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(_element("line", x1=_LEFT, x2=width - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(_text(tick_label(tick, step or tick), _LEFT - 8, y(tick), "end"))
    return _join(*parts)


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return _element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", dy="0.35em", text_anchor=anchor)


def _mark(x: float, height: int) -> Markup:
    line = _element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=_TOP, y2=height - _BOTTOM)
    arrow = _element("path", d=f"M{x - 5:.1f} {_TOP - 8} h10 l-5 8 z")
    return _element("g", line, arrow, class_="mark")


def _curves(positions: Sequence[Point], noisy: bool) -> list[Markup]:
    """Return the curve, and its mean over coordinates (not values), which also fits a log axis."""
    if len(positions) == 1:
        return [_element("circle", cx=f"{positions[0][0]:.1f}", cy=f"{positions[0][1]:.1f}", r=4, class_="dot")]
    if not noisy or not smooth_window(len(positions)):
        return [_polyline(positions, "smooth")]
    means = zip([position for position, _ in positions], smooth([position for _, position in positions]), strict=True)
    return [_polyline(positions, "raw"), _polyline(list(means), "smooth")]


def _dotted(positions: Sequence[Point]) -> list[Markup]:
    shown = downsample(positions, OVERLAY_POINTS)
    dots = [_element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_="beside-dot") for x, y in shown]
    return [_polyline(shown, "beside"), *dots] if shown else []


def _polyline(positions: Sequence[Point], kind: str, limit: int = MAX_POINTS) -> Markup:
    return _element(
        "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in downsample(positions, limit)), class_=kind
    )


def interval_bar(value: float, low: float, high: float, kind: str, label: str) -> Markup:
    """Return a dot with its interval as a whisker, on a line from 0 to 1; `kind` is the CSS class."""
    x = Scale(0, 1, _BAR_MARGIN, _BAR_WIDTH - _BAR_MARGIN)
    middle = _BAR_HEIGHT / 2
    stops = [_element("line", x1=x(at), x2=x(at), y1=4, y2=_BAR_HEIGHT - 4, class_="grid") for at in (0, 0.5, 1)]
    left, right = f"{x(low):.1f}", f"{x(high):.1f}"
    ends = [_element("line", x1=at, x2=at, y1=middle - 6, y2=middle + 6, class_="whisker") for at in (left, right)]
    return _element(
        "svg",
        _element("title", label),
        _element("line", x1=x(0), x2=x(1), y1=middle, y2=middle, class_="grid"),
        *stops,
        _element("line", x1=left, x2=right, y1=middle, y2=middle, class_="whisker"),
        *ends,
        _element("circle", cx=f"{x(value):.1f}", cy=middle, r=3, class_="dot"),
        viewBox=f"0 0 {_BAR_WIDTH} {_BAR_HEIGHT}",
        class_=f"bar {kind}",
        role="img",
    )


def _element(name: str, *children: str, **attributes: str | float) -> Markup:
    """Return an SVG element.

    Args:
        name: name of the element; must be a constant, never data.
        children: escaped unless they are Markup.
        attributes: `class_` becomes class, and every other underscore a hyphen; values are escaped.
    """
    words = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()]
    return Markup(f"<{name}{''.join(words)}>{_join(*children)}</{name}>")


def _join(*children: str) -> Markup:
    return Markup("").join(children)
