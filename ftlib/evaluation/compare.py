"""Whether two models differ on the same rows: a paired test from their predictions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.metrics.comparability import evaluation_fingerprint, setting_differences
from ftlib.metrics.uncertainty import paired_test
from ftlib.tasks.registry import task_of


def compare_evaluations(config: Config, labels: list[str], a: Path, b: Path) -> dict[str, Any]:
    """The difference B − A of the task's headline metric.

    Args:
        a, b: finished evaluations of the same rows.

    Returns:
        metric, difference, interval, p, groups and verdict.
    """
    samples = []
    for folder in (a, b):
        records = jsonl.read_jsonl_log(folder / "predictions.jsonl")
        samples.append(task_of(config).score(records, labels, config.evaluation.positive).sample)
    metric = files.read_json(b / "scores.json")["metric"]
    comparison = paired_test(samples[0], samples[1], metric)
    return {"metric": metric, **asdict(comparison), "verdict": comparison.verdict}


def compare_before_after(config: Config, labels: list[str], before: Path, after: Path) -> dict[str, Any] | None:
    """What training changed on a split; comparison.json beside the two evaluations keeps it.

    Returns:
        `compare_evaluations`, all of it as a sentence, and `of`, which tells the two evaluations that it compares;
        None if one is missing or has no score, or if they were not asked the same rows in the same way.
    """
    if not (files.is_complete(before) and files.is_complete(after)):
        return None
    scores = [files.read_json(folder / "scores.json") for folder in (before, after)]
    if setting_differences(*scores) or None in [one["value"] for one in scores]:
        return None
    found = compare_evaluations(config, labels, before, after)
    low, high = found["interval"]
    size = f"{found['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, p = {found['p']:.4f})"
    direction = "" if task_of(config).higher_is_better(found["metric"]) else " (lower is better)"
    sentence = f"training changed {found['metric']}{direction} by {size}: {found['verdict']}"
    change = {**found, "sentence": sentence, "of": [evaluation_fingerprint(one) for one in scores]}
    files.write_json(after.with_name("comparison.json"), change)
    return change
