"""Values and intervals of metrics as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftlib.core.metric_table import metric_info_of_rule


def unit_of(scores: Mapping[str, Any], name: str) -> str:
    """The unit of a metric in scores.json, of which not all need have the headline's."""
    info = metric_info_of_rule(scores.get("rule", ""), name)
    return info.unit if info else str(scores.get("unit", ""))


def format_value(value: float | None, unit: str, digits: int = 4) -> str:
    """A value for tables and sentences: percentages with two decimals and their sign, others with `digits`."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.2f} %" if unit == "percent" else f"{value:.{digits}f}"


def format_interval(interval: tuple[float, float] | None, unit: str, digits: int = 4) -> str:
    """An interval for tables."""
    if not interval:
        return "–"
    low, high = (format_value(end, unit, digits) for end in interval)
    return f"{low.removesuffix(' %')}–{high}"


def format_difference_interval(interval: tuple[float, float] | None) -> str:
    """The interval of a difference, for tables and sentences."""
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "–"
