"""The result of a metric as JSON and as a text table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftlib.core import log
from ftlib.core.metric_table import metric_info_of_rule
from ftlib.metrics.base import MetricResult
from ftlib.metrics.formatting import format_interval, format_value, unit_of
from ftlib.metrics.uncertainty import FEW_GROUPS, LEVEL, Interval

INTERVAL_METHOD = (
    f"level {LEVEL}: Wilson's interval with the jackknife's standard error over images or documents, and Student's "
    "quantile with Satterthwaite's degrees of freedom; a share of independent yes/no rows: Wilson"
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
        "unit": info.unit if (info := metric_info_of_rule(result.rule, result.headline)) else result.unit,
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
        rows = f"{groups} independent row{'s' * (groups > 1)}"
        said.append(f"Only {rows}: these scores are rough; do not choose between models by them.")
    return said


def format_summary(scores: Mapping[str, Any]) -> str:
    """A table of all metrics, the headline first, with remarks.

    Args:
        scores: see `summary`.
    """
    metrics, with_intervals = scores["metrics"], bool(scores["interval_method"])
    names = [scores["metric"], *[name for name in metrics if name != scores["metric"]]]
    headers = ["metric", "value", *(["95 % interval"] if with_intervals else []), "rule"]
    rows = [[*_row(name, metrics[name], unit_of(scores, name), with_intervals), _rule(scores, name)] for name in names]
    counted = f"n = {scores['n']}" + (f" in {scores['groups']} groups" if scores["groups"] != scores["n"] else "")
    said = [log.format_table(headers, rows), f"{scores['rule']}, {counted}, {scores['invalid']} invalid"]
    return "\n".join([*said, *scores["remarks"]])


def _rule(scores: Mapping[str, Any], name: str) -> str:
    """What a metric counts; empty for the parts of a breakdown."""
    info = None if ": " in name else metric_info_of_rule(scores["rule"], name)
    return f"{info.rule}{'' if info.higher_is_better else '; lower is better'}" if info else ""


def _row(name: str, metric: Mapping[str, Any], unit: str, with_interval: bool) -> list[str]:
    return [name, format_value(metric["value"], unit), *([format_interval(metric["interval"], unit)] * with_interval)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
