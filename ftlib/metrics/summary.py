"""The result of a metric as JSON and as a text table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftlib.core import log
from ftlib.metrics.base import MetricResult
from ftlib.metrics.uncertainty import FEW_GROUPS, LEVEL, RESAMPLES, Interval

METHOD = (
    f"level {LEVEL}: percentile bootstrap over images or documents, {RESAMPLES} resamples; "
    "a share of independent yes/no rows: Wilson"
)


def summary(result: MetricResult, intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    """The content of scores.json and `score --json`; undefined values are null.

    Returns:
        metric, value and interval of the headline; rule, unit, n, groups, invalid; metrics (name → value, interval);
        tables; remarks.
    """
    metrics = {
        name: {"value": _finite(value), "interval": intervals.get(name)} for name, value in result.values().items()
    }
    return {
        "metric": result.headline,
        **metrics[result.headline],
        "interval_method": METHOD if intervals else None,
        "rule": result.rule,
        "unit": result.unit,
        "n": result.n,
        "groups": len(result.sample.groups),
        "invalid": result.invalid,
        "metrics": metrics,
        "tables": result.tables,
        "remarks": remarks(result),
    }


def remarks(result: MetricResult) -> list[str]:
    """Warnings about the numbers: metrics that were not computed, too few rows."""
    said = [f"{name}: not computed: {reason}" for name, reason in result.notes.items()]
    groups = len(result.sample.groups)
    if groups < FEW_GROUPS:
        said.append(f"Only {groups} independent rows: these scores are rough; do not choose between models by them.")
    return said


def format_summary(result: MetricResult, intervals: Mapping[str, Interval | None]) -> str:
    """A table of all metrics, the headline first, with remarks."""
    values = result.values()
    names = [result.headline, *[name for name in values if name != result.headline]]
    headers = ["metric", result.unit, *(["95 % interval"] if intervals else [])]
    rows = [_row(name, values[name], result.unit, intervals) for name in names]
    groups = len(result.sample.groups)
    counted = f"n = {result.n}" + (f" in {groups} groups" if groups != result.n else "")
    said = [log.format_table(headers, rows), f"{result.rule}, {counted}, {result.invalid} invalid"]
    return "\n".join([*said, *remarks(result)])


def format_value(value: float | None, unit: str) -> str:
    """A value for tables: two decimals for percentages, four for fractions."""
    return "–" if value is None or math.isnan(value) else f"{value:.{2 if unit == 'percent' else 4}f}"


def format_interval(interval: Interval | None, unit: str) -> str:
    """An interval for tables."""
    return f"{format_value(interval[0], unit)}–{format_value(interval[1], unit)}" if interval else "–"


def _row(name: str, value: float, unit: str, intervals: Mapping[str, Interval | None]) -> list[str]:
    return [name, format_value(value, unit), *([format_interval(intervals.get(name), unit)] if intervals else [])]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
