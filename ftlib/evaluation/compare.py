"""Compare two models on the same rows with a paired test of their predictions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.metrics.comparability import describe_differences, evaluation_fingerprint, setting_differences
from ftlib.metrics.formatting import format_difference_interval
from ftlib.metrics.uncertainty import paired_test
from ftlib.tasks.registry import task_of


def compare_evaluations(config: Config, labels: list[str], a: Path, b: Path) -> dict[str, Any]:
    """Return the difference B − A of the task's main metric.

    Args:
        a, b: finished evaluations of the same rows.

    Returns:
        metric, difference, interval, p, groups and verdict.
    """
    samples = []
    for folder in (a, b):
        records = jsonl.read_jsonl_log(folder / "predictions.jsonl")
        samples.append(task_of(config).measure(records, labels, config.evaluation).sample)
    metric = files.read_json(b / "scores.json")["metric"]
    comparison = paired_test(samples[0], samples[1], metric)
    return {"metric": metric, **asdict(comparison), "verdict": comparison.verdict}


def compare_before_after(config: Config, labels: list[str], before: Path, after: Path) -> dict[str, Any] | None:
    """Compare a split before and after training; the result is stored in comparison.json beside the two evaluations.

    Returns:
        The result of `compare_evaluations`, with a sentence and `of`, which identifies the two evaluations; None if
        one is missing or has no score, or if rows or settings differ.
    """
    if not (files.is_complete(before) and files.is_complete(after)):
        return None
    scores = [files.read_json(folder / "scores.json") for folder in (before, after)]
    if setting_differences(*scores) or None in [one["value"] for one in scores]:
        return None
    found = compare_evaluations(config, labels, before, after)
    interval = format_difference_interval(found["interval"])
    size = f"{found['difference']:+.4f} (95 % interval {interval}, p = {found['p']:.4f})"
    direction = "" if task_of(config).higher_is_better(found["metric"]) else " (lower is better)"
    sentence = f"training changed {found['metric']}{direction} by {size}: {found['verdict']}"
    change = {**found, "sentence": sentence, "of": [evaluation_fingerprint(one) for one in scores]}
    files.write_json(after.with_name("comparison.json"), change)
    return change


def differences_before_after(before: Path, after: Path) -> list[str]:
    """Return why the scores before and after training are not comparable; empty if they are, or one is missing."""
    if not (files.is_complete(before) and files.is_complete(after)):
        return []
    return describe_differences(*(files.read_json(folder / "scores.json") for folder in (before, after)))
