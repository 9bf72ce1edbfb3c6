"""Compare prompts with the base model on valid.

Compares `data.prompt`, `evaluation.prompts` and every --prompt. The config is not changed: the best prompt is printed
as a line for the config, with a paired test of the others against it. Existing predictions are reused. ranking.json and
the predictions and scores of every prompt are stored in <runs>/<name>/prompts/<dataset>/valid/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftlib.cli import arguments
from ftlib.core import files, imports, log
from ftlib.core.paths import find_site
from ftlib.metrics.formatting import format_interval, format_value
from ftlib.models.libraries import hide_unused_packages
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
    hide_unused_packages(config, site)
    with imports.quick_imports():
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
    log.result(_table(ranking))
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
    """Return a remark about prompts that do not differ significantly from the best."""
    alike = [one["prompt"] for one in ranking[1:] if one["against_best"] and one["against_best"]["verdict"] != "real"]
    return [f"{len(alike)} of the others: no significant difference from the best on these rows."] if alike else []


def _config_line(prompt: str) -> str:
    """Return the line for the config; JSON strings are valid YAML."""
    return f"data: {{prompt: {json.dumps(prompt, ensure_ascii=False)}}}"
