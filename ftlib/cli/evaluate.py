"""Generate predictions for the splits of a dataset and score them.

RUN: the fine-tuned model, and the base model too with `evaluation.before: true`. CONFIG --before: only the base model.
With --data, the datasets of other configs, each with its own prompt. Existing predictions are reused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.data.moved import find_experiment
from ftlib.evaluation.evaluate_run import evaluate_run
from ftlib.metrics.comparability import describe_settings
from ftlib.metrics.formatting import format_interval, format_value
from ftlib.models.libraries import hide_unused_packages
from ftlib.runs.run import require_evaluable
from ftlib.tasks.registry import task_of


def main(argv: list[str]) -> int:
    """`ftlib evaluate RUN|CONFIG [KEY=VALUE…] [--split S…] [--data CONFIG…] [--before] [--json]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    experiment, run = find_experiment(parsed.run, parsed.overrides, site)
    if not parsed.before:
        require_evaluable(experiment, run, site)
    hide_unused_packages(experiment.config, site)
    results = evaluate_run(experiment, run, site, parsed.split or (), parsed.data or (), parsed.before)
    if results:
        log.result(_table(results, task_of(experiment.config).columns))
        for line in _remarks(results):
            log.warning(line)
    if parsed.json and results:
        log.print_json(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("evaluate", __doc__)
    command.add_argument(
        "--split", action="append", choices=["train", "valid", "test"], help="instead of evaluation.splits; repeatable"
    )
    command.add_argument(
        "--data", action="append", type=Path, metavar="CONFIG", help="instead of the run's own dataset; repeatable"
    )
    command.add_argument("--before", action="store_true", help="only the base model")
    command.add_argument("--json", action="store_true", help="print all scores to stdout")
    command.add_argument("run", metavar="RUN|CONFIG", help="run folder or its name, or a config file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a field; of a RUN, one of evaluation")
    return command


def _table(results: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    headers = ["data", "split", "training", "metric", "value", "95 % interval", "n", "invalid", "cut off"]
    rows = []
    for scores in results:
        for part, own in {"": scores, **scores.get("parts", {})}.items():
            split = scores["split"] + ("*" if "other_settings" in scores else "")
            place = [f"{scores['data']}{part and '/'}{part}", split, scores["when"]]
            rows += [[*place, *cells] for cells in _cells(own, columns)]
    return log.format_table(headers, rows)


def _cells(scores: dict[str, Any], columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield a task's metrics, each with value, interval, n and number of invalid answers."""
    for name in [name for name in columns if name in scores["metrics"]]:
        found, unit = scores["metrics"][name], scores["unit"]
        shown = [format_value(found["value"], unit), format_interval(found["interval"], unit)]
        cut = scores.get("answers", {}).get("cut_off")
        yield [name, *shown, str(scores["n"]), str(scores["invalid"]), "–" if cut is None else str(cut)]


def _remarks(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield remarks about the scores."""
    if others := next((scores["other_settings"] for scores in results if "other_settings" in scores), None):
        yield (
            f"* {describe_settings(others)}: not the settings of the run's config, so these scores are kept apart and "
            "are not the run's headline"
        )
    for scores in results:
        where = f"{scores['data']} {scores['split']} {scores['when']}"
        yield from (f"{where}: {remark}" for remark in scores["remarks"])
        if change := scores.get("change"):
            yield f"{where}: {change['sentence']}"
        yield from (f"{where}: {difference}" for difference in scores.get("incomparable", []))
