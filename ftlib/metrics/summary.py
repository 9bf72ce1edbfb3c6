"""The result of a metric as JSON and as a text table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftlib.core import log
from ftlib.metrics.base import MetricResult
from ftlib.metrics.uncertainty import FEW_GROUPS, LEVEL, Interval

INTERVAL_METHOD = (
    f"level {LEVEL}: Wilson's interval with the jackknife's standard error over images or documents, and Student's "
    "quantile; a share of independent yes/no rows: Wilson"
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
        "interval_method": INTERVAL_METHOD if intervals else None,
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
    said += result.remarks
    groups = len(result.sample.groups)
    if groups < FEW_GROUPS:
        said.append(f"Only {groups} independent rows: these scores are rough; do not choose between models by them.")
    return said


def format_summary(scores: Mapping[str, Any]) -> str:
    """A table of all metrics, the headline first, with remarks.

    Args:
        scores: see `summary`.
    """
    unit, metrics, with_intervals = scores["unit"], scores["metrics"], bool(scores["interval_method"])
    names = [scores["metric"], *[name for name in metrics if name != scores["metric"]]]
    headers = ["metric", unit, *(["95 % interval"] if with_intervals else [])]
    rows = [_row(name, metrics[name], unit, with_intervals) for name in names]
    counted = f"n = {scores['n']}" + (f" in {scores['groups']} groups" if scores["groups"] != scores["n"] else "")
    said = [log.format_table(headers, rows), f"{scores['rule']}, {counted}, {scores['invalid']} invalid"]
    return "\n".join([*said, *scores["remarks"]])


def format_value(value: float | None, unit: str) -> str:
    """A value for tables: two decimals for percentages, four for fractions."""
    return "–" if value is None or math.isnan(value) else f"{value:.{2 if unit == 'percent' else 4}f}"


def format_interval(interval: Interval | None, unit: str) -> str:
    """An interval for tables."""
    return f"{format_value(interval[0], unit)}–{format_value(interval[1], unit)}" if interval else "–"


def format_difference_interval(interval: Interval | None) -> str:
    """The interval of a difference, for tables and sentences."""
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "–"


def _row(name: str, metric: Mapping[str, Any], unit: str, with_interval: bool) -> list[str]:
    return [name, format_value(metric["value"], unit), *([format_interval(metric["interval"], unit)] * with_interval)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
