"""The report of several runs, such as a sweep: ranking of settings with uncertainty, and the status of all runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ftlib import __version__
from ftlib.reports import charts
from ftlib.reports.html import Context, render_page
from ftlib.reports.run_record import RunRecord, describe_state, interruptions
from ftlib.reports.run_report import commands, cost, utc
from ftlib.reports.sweep_stats import (
    REPORT_SPLIT,
    SELECTION_SPLIT,
    RunGroup,
    comparison_groups,
    evaluated_on_different_rows,
    trained_groups,
)
from ftlib.reports.sweep_tables import cross_table, effects, format_statistics, leaderboards, models_table, runs_table
from ftlib.reports.tables import Table

COLOURS = 8
"""Number of best settings with a separate colour; the others are grey."""


def sweep_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Return all tables of the page."""
    groups = trained_groups(records)
    beside = models_table(groups, [record for record in records if record.evaluated_only])
    trained = [*effects(groups), cross_table(groups), runs_table(groups)] if groups else []
    return [table for table in (*leaderboards(groups), beside, *trained) if table]


def render_sweep(records: Sequence[RunRecord], made: float, templates: Path | None = None) -> str:
    """Return the page.

    Args:
        records: two or more, from `run_record.read_run_record`.
        made: time of the report, in seconds since 1970.
        templates: a folder of templates that replace those of the same name.

    Raises:
        UserError: a template of that folder has an error.
    """
    groups = trained_groups(records)
    names = ", ".join(dict.fromkeys(record.config.name for record in records))
    best = best_sentence(groups)
    return render_page(
        f"{names}: {best}",
        "sweep.html.j2",
        templates,
        names=names,
        count=len(records),
        states=count_states(records),
        headline=best,
        tables=sweep_tables(records),
        curves=_curves(groups),
        selection_split=SELECTION_SPLIT,
        best_runs=[
            _best_run(board[0].best_run) for board in comparison_groups(groups) if len(best_settings(board)) == 1
        ],
        footer=f"Made {utc(made)} by ftlib {__version__}",
    )


def count_states(records: Sequence[RunRecord]) -> str:
    """Return the number of runs by state, the number of models that were only evaluated, and the GPU-hours."""
    counts = Counter(describe_state(record)[0] for record in records if not record.evaluated_only)
    words = ", ".join(f"{number} {word}" for word, number in counts.most_common())
    asked = sum(record.evaluated_only for record in records)
    trained = f"{counts.total()} run{'s' * (counts.total() != 1)}: {words}"
    told = [trained] if counts else []
    told += [f"{asked} only evaluated, without training"] if asked else []
    return "; ".join(filter(None, [*told, interruptions(*records), cost(records)])) + "."


def best_sentence(groups: Sequence[RunGroup]) -> str:
    """Return the best setting on valid with its score on test, for each comparison group."""
    if not groups:
        return "Comparison of models without training"
    found = [text for board in comparison_groups(groups) if (text := _best_of(board))]
    if not found:
        return f"No scores on {SELECTION_SPLIT} after training yet, so no ranking"
    unlike = any(
        evaluated_on_different_rows([group.runs for group in board], SELECTION_SPLIT)
        for board in comparison_groups(groups)
    )
    return f"Best on {SELECTION_SPLIT}: {' · '.join(found)}{' (settings were evaluated on different rows)' * unlike}"


def best_settings(board: Sequence[RunGroup]) -> list[RunGroup]:
    """Return the settings with the best mean on valid: several in a tie, none without scores."""
    best = board[0].seed_statistics(SELECTION_SPLIT)
    if best is None:
        return []
    found = [(group, group.seed_statistics(SELECTION_SPLIT)) for group in board]
    return [group for group, known in found if known and math.isclose(known.mean, best.mean, rel_tol=1e-12)]


def _best_of(board: Sequence[RunGroup]) -> str:
    group, tied = board[0], best_settings(board)
    if len(tied) > 1:
        chosen = format_statistics(group.seed_statistics(SELECTION_SPLIT), group.unit)
        return f"no best setting, {len(tied)} of {len(board)} are tied at {group.metric} {chosen}"
    found, reported = group.seed_statistics(SELECTION_SPLIT), group.seed_statistics(REPORT_SPLIT)
    if found is None:
        return ""
    told = f"; {REPORT_SPLIT} {format_statistics(reported, group.unit)}" if reported else ""
    return f"{group.name} – {group.metric} {format_statistics(found, group.unit)}{told}"


def _curves(groups: Sequence[RunGroup]) -> Context | None:
    curves = [
        (min(number, COLOURS), points)
        for number, group in enumerate(groups)
        for run in group.runs
        if (points := run.curve("loss"))
    ]
    if not curves:
        return None
    legend = [{"colour": number, "name": group.name} for number, group in enumerate(groups[:COLOURS])]
    if len(groups) > COLOURS:
        legend.append({"colour": COLOURS, "name": f"the other {len(groups) - COLOURS}"})
    return {"legend": legend, "chart": charts.overlay_chart(f"Loss of {len(curves)} runs", curves, 760, 320)}


def _best_run(run: RunRecord) -> Context:
    """Return its config and the commands that reproduce it."""
    return {"name": run.name, "config": run.config_text, "commands": "\n".join(commands(run))}
