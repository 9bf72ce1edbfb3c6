"""Rank prompts with the untrained model: which one does the task best on valid, before anything is learned?

Compared are `data.prompt`, those of `evaluation.prompts` and every --prompt. Nothing is chosen for you: the best is
shown as the line for the config, beside a paired test of the others against it. What has been answered already is not
asked again; ranking.json and every prompt's answers and scores lie in <runs>/<name>/prompts/<dataset>/valid/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftlib import command_line, console, files, runs
from ftlib.metrics.summary import number, span
from ftlib.site import find_site

SPLIT = "valid"


def main(argv: list[str]) -> int:
    """`ftlib prompts CONFIG [KEY=VALUE…] [--prompt P…] [--json]`"""
    command = command_line.parser("prompts", __doc__)
    command_line.add_config(command)
    command.add_argument("--prompt", metavar="P", action="append", default=[], help="one more candidate; repeatable")
    command.add_argument("--json", action="store_true", help="print the ranking as JSON to stdout")
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    config = command_line.load(parsed, site).config
    from ftlib.data.prepared import open_prepared
    from ftlib.evaluation import subject
    from ftlib.evaluation.asked import Asked
    from ftlib.evaluation.ranking import rank_prompts

    asked = Asked(subject.untrained(config, site), config, open_prepared(config, site))
    prompts = list(dict.fromkeys([config.data.prompt, *config.evaluation.prompts, *parsed.prompt]))
    folder = runs.prompts_folder(config.name, site) / config.data.source / SPLIT
    ranking = rank_prompts(asked, prompts, SPLIT, folder)
    if ranking is None:
        return 0
    files.write_json(folder / "ranking.json", ranking)
    console.say(_table(ranking))
    for line in dict.fromkeys([*ranking[0]["remarks"], *_remarks(ranking)]):
        console.say(line)
    print(json.dumps(ranking, ensure_ascii=False, indent=1) if parsed.json else _line(ranking[0]["prompt"]))
    return 0


def _table(ranking: Sequence[dict[str, Any]]) -> str:
    headers = ["prompt", ranking[0]["metric"], "95 % interval", "n", "invalid", "against the best", "p", ""]
    return console.table(headers, [_row(one) for one in ranking])


def _row(one: dict[str, Any]) -> list[str]:
    unit, change = one["unit"], one["against_best"]
    shown = [json.dumps(one["prompt"], ensure_ascii=False), number(one["value"], unit), span(one["interval"], unit)]
    compared = [number(change["difference"], unit), f"{change['p']:.4f}", change["verdict"]] if change else ["–"] * 3
    return [*shown, str(one["n"]), str(one["invalid"]), *compared]


def _remarks(ranking: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers do not decide."""
    alike = [one["prompt"] for one in ranking[1:] if one["against_best"] and one["against_best"]["verdict"] != "real"]
    return [f"{len(alike)} of the others cannot be told from the best on these rows."] if alike else []


def _line(prompt: str) -> str:
    """What to write into the config; JSON's strings are YAML's."""
    return f"data: {{prompt: {json.dumps(prompt, ensure_ascii=False)}}}"
