"""Score result files of a dataset's own format: references and predictions in, the content of scores.json out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftlib.core import registry
from ftlib.errors import UserError
from ftlib.metrics.answers import add_answer_counts
from ftlib.metrics.base import MetricResult
from ftlib.metrics.summary import summary
from ftlib.metrics.uncertainty import confidence_intervals, paired_test

SCORERS = {entry.scored_as or entry.name: entry.scorer for entry in registry.TASKS.values() if entry.scorer}
"""Task → the module whose `score` reads its files."""

OPTIONS = {"choices": "gqa", "positive": "classify", "tokenize": "text"}
"""Option → the one task that takes it."""


def score_files(
    task: str,
    references: Sequence[Path],
    predictions: Path,
    against: Path | None = None,
    intervals: bool = True,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a result file, and with `against` compare a second one with it.

    Args:
        task: see `SCORERS`.
        references: what the dataset's release holds.
        intervals: whether to compute confidence intervals.
        options: of `OPTIONS`, those that are set.

    Returns:
        See `metrics.summary.summary`; with `against` also metric → difference (second - first), interval, p, verdict.

    Raises:
        UserError: no such task, an option of another task, or faulty files.
    """
    if task not in SCORERS:
        raise UserError(f"{task}: no result files are read for this task", f"There are: {', '.join(SCORERS)}")
    options = {name: value for name, value in (options or {}).items() if value is not None}
    for name in options:
        if OPTIONS[name] != task:
            raise UserError(f"--{name} is for {OPTIONS[name]}, not for {task}")
    scorer = importlib.import_module(SCORERS[task])
    measured: MetricResult = scorer.score(references, predictions, **options)
    scores = summary(measured, confidence_intervals(measured) if intervals else {})
    if measured.answers:
        add_answer_counts(scores, measured.answers, measured.tables.get("labels", ()))
    if against:
        scores["against"] = _differences(measured, scorer.score(references, against, **options))
    return scores


def _differences(first: MetricResult, second: MetricResult) -> dict[str, dict[str, Any]]:
    """Second - first, for every metric that is no part of a breakdown."""
    names = [name for name in first.values() if ": " not in name and name not in first.constants]
    found = {name: paired_test(first.sample, second.sample, name) for name in names}
    return {name: {**asdict(one), "verdict": one.verdict} for name, one in found.items()}
