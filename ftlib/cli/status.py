"""Show the status of runs with the reason for every failure; with --usage their GPU-hours and goodput.

For the output of a run: `ftlib logs RUN`. If Slurm does not respond, the table shows the state in the run folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import Site, find_site
from ftlib.runs import run as runs
from ftlib.runs.checkpoint_interval import advice
from ftlib.runs.usage import TimeUse, Usage, usage
from ftlib.slurm.accounting import known_allocations
from ftlib.slurm.status import RunStatus, run_statuses


def main(argv: list[str]) -> int:
    """`ftlib status [RUN…] [--usage] [--json]`"""
    command = arguments.make_parser("status", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="*", help="run folders or names; default: all")
    command.add_argument("--usage", action="store_true", help="GPU-hours, goodput, CPUs in use, by run and by name")
    command.add_argument("--json", action="store_true", help="print to stdout for programs")
    parsed = command.parse_args(argv)
    site = find_site()
    chosen = runs.find_runs(parsed.runs, site)
    if not chosen:
        log.info(f"no runs in {site.runs}")
    if parsed.usage:
        return _print_usage(chosen, site, parsed.json)
    records = [dataclasses.asdict(one) for one in run_statuses(chosen, site)]
    if parsed.json:
        log.print_json(records)
    elif chosen:
        log.print_result(_table(records))
    return 0


_OPTIONAL = ("recipe", "rows/s", "tokens/s", "goodput")
"""Columns that are left out where no run has a value."""


def _table(records: Sequence[dict[str, Any]]) -> str:
    """Return the table; columns for recipes, speeds and goodput only if a run has one."""
    rows = [_row(RunStatus(**record)) for record in records]
    headers = [name for name in rows[0] if name not in _OPTIONAL or any(row[name] not in ("", "0") for row in rows)]
    cells = [[row[name] for name in headers] for row in rows]
    return log.format_table(headers, cells, ["state", "node", "reason"])


def _row(one: RunStatus) -> dict[str, str]:
    return {
        "run": one.run,
        "recipe": str(one.recipe),
        "state": one.state,
        "step": f"{one.step}/{one.total}" if one.total is not None else str(one.step) if one.step else "",
        "s/step": f"{one.seconds_per_step:.2f}" if one.seconds_per_step is not None else "",
        "rows/s": f"{one.rows_per_second:.1f}" if one.rows_per_second is not None else "",
        "tokens/s": f"{one.tokens_per_second:.1f}" if one.tokens_per_second is not None else "",
        "ETA": _duration(one.eta) if one.eta is not None else "",
        "goodput": f"{one.goodput:.0%}" if one.goodput is not None else "",
        "loss": f"{one.loss:.4f}" if one.loss is not None else "",
        "node": one.node,
        "reason": " ".join(one.reason.split()),
    }


def _duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _print_usage(chosen: Sequence[runs.Run], site: Site, as_json: bool) -> int:
    """Print the usage of runs: a line for each run, one for each name with several runs, and the total."""
    known = known_allocations(chosen, site)
    found = [usage(run, known[run]) for run in chosen]
    if as_json:
        pairs = zip(chosen, found, strict=True)
        log.print_json([{"run": runs.run_name(run, site), **_usage_record(run, one)} for run, one in pairs])
        return 0
    rows = []
    for name in dict.fromkeys(run.folder.parent.name for run in chosen):
        own = [(run, one) for run, one in zip(chosen, found, strict=True) if run.folder.parent.name == name]
        rows += [_usage_row(runs.run_name(run, site), [one]) for run, one in own]
        if len(own) > 1:
            rows.append(_usage_row(f"{name}: {len(own)} runs", [one for _, one in own]))
    if chosen:
        cells = [list(row.values()) for row in [*rows, _usage_row("all", found)]]
        log.print_result(log.format_table(list(rows[0]), cells, ["CPUs"]))
    for run, one in zip(chosen, found, strict=True):
        if remark := advice(run, one.time):
            log.info(f"{runs.run_name(run, site)}: {remark}")
    return 0


def _usage_record(run: runs.Run, one: Usage) -> dict[str, Any]:
    """Return the usage of a run for programs; times are seconds."""
    return {"name": run.folder.parent.name, **dataclasses.asdict(one), "goodput": one.time.goodput}


def _usage_row(label: str, found: Sequence[Usage]) -> dict[str, str]:
    spent = sum((one.time for one in found), TimeUse())
    train, evaluate = sum(one.train for one in found), sum(one.evaluate for one in found)
    cpus = [one for one in found if one.cpus is not None and one.cpus_used is not None]
    asked, used = sum(one.cpus or 0.0 for one in cpus), sum(one.cpus_used or 0.0 for one in cpus)
    of_gpu = [one.gpu_utilization for one in found if one.gpu_utilization is not None]

    def share(seconds: float) -> str:
        return f"{seconds / spent.allocated:.0%}" if spent.allocated else ""

    return {
        "run": label,
        "attempts": str(sum(one.attempts for one in found)),
        "training GPU-h": f"{train:.2f}",
        "evaluation GPU-h": f"{evaluate:.2f}",
        "GPU-h": f"{train + evaluate:.2f}",
        "hours": f"{spent.allocated / 3600:.2f}",
        "goodput": share(spent.training),
        "start-up": share(spent.startup),
        "lost": share(spent.lost),
        "saving": share(spent.saving),
        "evaluation": share(spent.evaluation),
        "other": share(spent.other),
        "queued h": f"{spent.queued / 3600:.2f}" if spent.queued else "",
        "CPUs": f"{asked / len(cpus):.3g} asked, {used / len(cpus):.2g} used" if cpus else "",
        "GPU use": f"{sum(of_gpu) / len(of_gpu):.0f}%" if of_gpu else "",
    }
