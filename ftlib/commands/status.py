"""What runs, what died and why: a table of runs, or what they cost.

Of a run whose output is wanted: `ftlib logs RUN`. Without Slurm's answer, the table tells what the run folders know.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ftlib import command_line, console, history, runs
from ftlib.reporting.standing import Standing, standings_of
from ftlib.site import Site, find_site


def main(argv: list[str]) -> int:
    """`ftlib status [RUN…] [--usage] [--json]`"""
    command = command_line.parser("status", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="*", help="run folders or names; default: all")
    command.add_argument("--usage", action="store_true", help="GPU-hours, run by run and by name")
    command.add_argument("--json", action="store_true", help="print to stdout for programs")
    parsed = command.parse_args(argv)
    site = find_site()
    chosen = runs.find_runs(parsed.runs, site)
    if not chosen:
        console.say(f"no runs in {site.runs}")
    if parsed.usage:
        records = [_usage(run, site) for run in chosen]
    else:
        records = [dataclasses.asdict(one) for one in standings_of(chosen, site)]
    if parsed.json:
        print(json.dumps(records, ensure_ascii=False, indent=1))
    elif chosen:
        print(_usage_table(records) if parsed.usage else _table(records))
    return 0


def _table(records: Sequence[dict[str, Any]]) -> str:
    """With a column for recipes where not all runs are of the first one."""
    told = any(record["recipe"] for record in records)
    headers = ["run", *["recipe"] * told, "state", "step", "s/step", "ETA", "loss", "node", "reason"]
    rows = [_row(Standing(**record), told) for record in records]
    return console.table(headers, rows, ["state", "node", "reason"])


def _row(one: Standing, told: bool) -> list[str]:
    step = f"{one.step}/{one.total}" if one.total is not None else str(one.step) if one.step else ""
    pace = f"{one.seconds_per_step:.2f}" if one.seconds_per_step is not None else ""
    eta = _duration(one.eta) if one.eta is not None else ""
    loss = f"{one.loss:.4f}" if one.loss is not None else ""
    return [
        one.run,
        *[str(one.recipe)] * told,
        one.state,
        step,
        pace,
        eta,
        loss,
        one.node,
        " ".join(one.reason.split()),
    ]


def _duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _usage(run: runs.Run, site: Site) -> dict[str, Any]:
    """What a run has cost, by `history.usage`."""
    named = {"run": runs.handle(run, site), "name": run.folder.parent.name}
    return named | dataclasses.asdict(history.usage(run))


def _usage_table(records: Sequence[dict[str, Any]]) -> str:
    """A line for each run, one for each name with several runs, and the sum."""
    headers = ["run", "attempts", "training GPU-h", "evaluation GPU-h", "GPU-h"]
    rows = []
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        rows += [_usage_row(record["run"], [record]) for record in own]
        if len(own) > 1:
            rows.append(_usage_row(f"{name}: {len(own)} runs", own))
    return console.table(headers, [*rows, _usage_row("all", records)])


def _usage_row(label: str, records: Sequence[dict[str, Any]]) -> list[str]:
    sums = [sum(record[command] for record in records) for command in ("train", "evaluate")]
    attempts = sum(record["attempts"] for record in records)
    return [label, str(attempts), *[f"{hours:.2f}" for hours in (*sums, sum(sums))]]
