"""Ask a model every question of a split and score its answers.

RUN: the trained model, and the untrained one too if the config says `evaluation.before`. CONFIG --before: only the
untrained model. What has been evaluated already is not asked again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib import command_line, console, runs
from ftlib.config_file import Experiment, load_experiment
from ftlib.errors import UserError
from ftlib.runs import Run
from ftlib.site import Site, find_site


def main(argv: list[str]) -> int:
    """`ftlib evaluate RUN|CONFIG [KEY=VALUE…] [--split S…] [--before] [--json]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    experiment, run = _target(parsed, site)
    splits = parsed.split or experiment.config.evaluation.splits
    whens = ["before"] if parsed.before else ["before", "after"] if experiment.config.evaluation.before else ["after"]
    if "after" in whens and not run.done.exists():
        remedy = "Run `ftlib train` first, or add --before for the base model."
        raise UserError(f"{run.folder}: not trained yet", remedy)
    results = [scores for when in whens for scores in _evaluate(experiment, run, site, splits, when)]
    headers = ["model", "split", "metric", "value", "95 % interval", "n", "invalid"]
    console.say(console.table(headers, [_row(scores) for scores in results]))
    if parsed.json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    command = command_line.parser("evaluate", __doc__)
    command.add_argument(
        "--split", action="append", choices=["train", "valid", "test"], help="instead of evaluation.splits; repeatable"
    )
    command.add_argument("--before", action="store_true", help="only the untrained base model")
    command.add_argument("--json", action="store_true", help="print all scores to stdout")
    command.add_argument("run", metavar="RUN|CONFIG", help="run folder or its name, or a config file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="with CONFIG: set a field")
    return command


def _target(parsed: argparse.Namespace, site: Site) -> tuple[Experiment, Run]:
    """A config names the run that it would train; a run brings its own config."""
    if parsed.run.endswith((".yaml", ".yml")):
        experiment = load_experiment(Path(parsed.run), parsed.overrides, site)
        return experiment, runs.open_run(experiment, site)
    run = runs.find_run(parsed.run, site)
    return load_experiment(run.config_file, parsed.overrides, site), run


def _evaluate(experiment: Experiment, run: Run, site: Site, splits: Sequence[str], when: str) -> list[dict[str, Any]]:
    from ftlib.data.prepared import open_prepared
    from ftlib.evaluation import answers

    config = experiment.config
    prepared = open_prepared(config, site)
    subject = answers.untrained(config, site) if when == "before" else answers.trained(config, run, site)
    results = []
    for split in splits:
        folder = run.evaluation(config.data.source, split, when)
        scores = answers.evaluate_split(subject, config, prepared, split, folder)
        results.append({"when": when, "split": split, **scores})
    return results


def _row(scores: dict[str, Any]) -> list[str]:
    low, high = scores["interval"]
    return [
        scores["when"],
        scores["split"],
        scores["metric"],
        f"{scores['value']:.4f}",
        f"{low:.4f}–{high:.4f}",
        str(scores["n"]),
        str(scores["invalid"]),
    ]
