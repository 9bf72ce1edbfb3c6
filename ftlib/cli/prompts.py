"""Rank prompts with the untrained model: which one does the task best on valid, before anything is learned?

Compared are `data.prompt`, those of `evaluation.prompts` and every --prompt. Nothing is chosen for you: the best is
shown as the line for the config, beside a paired test of the others against it. What has been answered already is not
asked again; ranking.json and every prompt's answers and scores lie in <runs>/<name>/prompts/<dataset>/valid/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftlib.cli import arguments
from ftlib.core import files, log
from ftlib.core.paths import find_site
from ftlib.metrics.summary import format_interval, format_value
from ftlib.runs import run as runs

SPLIT = "valid"


def main(argv: list[str]) -> int:
    """`ftlib prompts CONFIG [KEY=VALUE…] [--prompt P…] [--json]`"""
    command = arguments.make_parser("prompts", __doc__)
    arguments.add_config_arguments(command)
    command.add_argument("--prompt", metavar="P", action="append", default=[], help="one more candidate; repeatable")
    command.add_argument("--json", action="store_true", help="print the ranking as JSON to stdout")
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    config = arguments.load_from_arguments(parsed, site).config
    from ftlib.data.dataset import open_prepared
    from ftlib.evaluation import model
    from ftlib.evaluation.evaluate import EvaluationRequest
    from ftlib.evaluation.prompt_search import compare_prompts

    asked = EvaluationRequest(model.base_model(config, site), config, open_prepared(config, site))
    prompts = list(dict.fromkeys([config.data.prompt, *config.evaluation.prompts, *parsed.prompt]))
    folder = runs.prompts_folder(config.name, site) / config.data.source / SPLIT
    ranking = compare_prompts(asked, prompts, SPLIT, folder)
    if ranking is None:
        return 0
    files.write_json(folder / "ranking.json", ranking)
    log.info(_table(ranking))
    for line in dict.fromkeys([*ranking[0]["remarks"], *_remarks(ranking)]):
        log.warning(line)
    log.print_json(ranking) if parsed.json else log.print_result(_config_line(ranking[0]["prompt"]))
    return 0


def _table(ranking: Sequence[dict[str, Any]]) -> str:
    headers = ["prompt", ranking[0]["metric"], "95 % interval", "n", "invalid", "against the best", "p", ""]
    return log.format_table(headers, [_row(one) for one in ranking])


def _row(one: dict[str, Any]) -> list[str]:
    unit, change = one["unit"], one["against_best"]
    shown = [
        json.dumps(one["prompt"], ensure_ascii=False),
        format_value(one["value"], unit),
        format_interval(one["interval"], unit),
    ]
    compared = (
        [format_value(change["difference"], unit), f"{change['p']:.4f}", change["verdict"]] if change else ["–"] * 3
    )
    return [*shown, str(one["n"]), str(one["invalid"]), *compared]


def _remarks(ranking: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers do not decide."""
    alike = [one["prompt"] for one in ranking[1:] if one["against_best"] and one["against_best"]["verdict"] != "real"]
    return [f"{len(alike)} of the others cannot be told from the best on these rows."] if alike else []


def _config_line(prompt: str) -> str:
    """What to write into the config; JSON's strings are YAML's."""
    return f"data: {{prompt: {json.dumps(prompt, ensure_ascii=False)}}}"
