"""The report of several runs, such as a sweep: which setting is best, how sure that is, and what became of them all."""

from __future__ import annotations

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
"""Settings that get a colour of their own; the best ones. The others share a grey."""


def sweep_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Everything that the page says in numbers."""
    groups = trained_groups(records)
    beside = models_table(groups, [record for record in records if record.evaluated_only])
    trained = [*effects(groups), cross_table(groups), runs_table(groups)] if groups else []
    return [table for table in (*leaderboards(groups), beside, *trained) if table]


def render_sweep(records: Sequence[RunRecord], made: float, templates: Path | None = None) -> str:
    """The page.

    Args:
        records: two or more, from `run_record.read_run_record`.
        made: when, in seconds since 1970.
        templates: a folder of templates that replace those of the same name.

    Raises:
        UserError: a template of that folder is at fault.
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
        best_runs=[_best_run(board[0].best_run) for board in comparison_groups(groups)],
        footer=f"Made {utc(made)} by ftlib {__version__}",
    )


def count_states(records: Sequence[RunRecord]) -> str:
    """How many runs are in which state, how many models were only asked, and what all of that has cost."""
    counts = Counter(describe_state(record)[0] for record in records if not record.evaluated_only)
    words = ", ".join(f"{number} {word}" for word, number in counts.most_common())
    asked = sum(record.evaluated_only for record in records)
    trained = f"{counts.total()} run{'s' * (counts.total() != 1)}: {words}"
    told = [trained] if counts else []
    told += [f"{asked} only asked, without training"] if asked else []
    return "; ".join(filter(None, [*told, interruptions(*records), cost(records)])) + "."


def best_sentence(groups: Sequence[RunGroup]) -> str:
    """The setting that valid chooses, and what test says of it; one for each contest."""
    if not groups:
        return "Models side by side, none of them trained here"
    found = [text for board in comparison_groups(groups) if (text := _best_of(board[0]))]
    if not found:
        return f"No scores on {SELECTION_SPLIT} after training yet: nothing to choose by"
    unlike = any(
        evaluated_on_different_rows([group.runs for group in board], SELECTION_SPLIT)
        for board in comparison_groups(groups)
    )
    return f"Best on {SELECTION_SPLIT}: {' · '.join(found)}{' (of settings that were asked different rows)' * unlike}"


def _best_of(group: RunGroup) -> str:
    chosen, reported = group.seed_statistics(SELECTION_SPLIT), group.seed_statistics(REPORT_SPLIT)
    if chosen is None:
        return ""
    told = f"; {REPORT_SPLIT} {format_statistics(reported)}" if reported else ""
    return f"{group.name} – {group.metric} {format_statistics(chosen)}{told}"


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
    """Its config and the commands that make it anew."""
    return {"name": run.name, "config": run.config_text, "commands": "\n".join(commands(run))}
