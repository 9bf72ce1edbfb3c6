"""Show the status of runs with the reason for every failure, or their GPU-hours.

For the output of a run: `ftlib logs RUN`. If Slurm does not respond, the table shows the state in the run folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import Site, find_site
from ftlib.runs import events
from ftlib.runs import run as runs
from ftlib.slurm.status import RunStatus, run_statuses


def main(argv: list[str]) -> int:
    """`ftlib status [RUN…] [--usage] [--json]`"""
    command = arguments.make_parser("status", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="*", help="run folders or names; default: all")
    command.add_argument("--usage", action="store_true", help="GPU-hours by run and by name")
    command.add_argument("--json", action="store_true", help="print to stdout for programs")
    parsed = command.parse_args(argv)
    site = find_site()
    chosen = runs.find_runs(parsed.runs, site)
    if not chosen:
        log.info(f"no runs in {site.runs}")
    if parsed.usage:
        records = [_usage_record(run, site) for run in chosen]
    else:
        records = [dataclasses.asdict(one) for one in run_statuses(chosen, site)]
    if parsed.json:
        log.print_json(records)
    elif chosen:
        log.print_result(_usage_table(records) if parsed.usage else _table(records))
    return 0


def _table(records: Sequence[dict[str, Any]]) -> str:
    """Return the table, with a column for recipes unless all runs have the first one."""
    with_recipe = any(record["recipe"] for record in records)
    headers = ["run", *["recipe"] * with_recipe, "state", "step", "s/step", "ETA", "loss", "node", "reason"]
    rows = [_row(RunStatus(**record), with_recipe) for record in records]
    return log.format_table(headers, rows, ["state", "node", "reason"])


def _row(one: RunStatus, with_recipe: bool) -> list[str]:
    step = f"{one.step}/{one.total}" if one.total is not None else str(one.step) if one.step else ""
    pace = f"{one.seconds_per_step:.2f}" if one.seconds_per_step is not None else ""
    eta = _duration(one.eta) if one.eta is not None else ""
    loss = f"{one.loss:.4f}" if one.loss is not None else ""
    return [
        one.run,
        *[str(one.recipe)] * with_recipe,
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


def _usage_record(run: runs.Run, site: Site) -> dict[str, Any]:
    """Return the usage of a run, see `events.usage`."""
    named = {"run": runs.run_name(run, site), "name": run.folder.parent.name}
    return named | dataclasses.asdict(events.usage(run))


def _usage_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a line for each run, one for each name with several runs, and the total."""
    headers = ["run", "attempts", "training GPU-h", "evaluation GPU-h", "GPU-h"]
    rows = []
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        rows += [_usage_row(record["run"], [record]) for record in own]
        if len(own) > 1:
            rows.append(_usage_row(f"{name}: {len(own)} runs", own))
    return log.format_table(headers, [*rows, _usage_row("all", records)])


def _usage_row(label: str, records: Sequence[dict[str, Any]]) -> list[str]:
    sums = [sum(record[command] for record in records) for command in ("train", "evaluate")]
    attempts = sum(record["attempts"] for record in records)
    return [label, str(attempts), *[f"{hours:.2f}" for hours in (*sums, sum(sums))]]
