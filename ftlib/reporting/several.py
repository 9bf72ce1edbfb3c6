"""The report of several runs, such as a sweep: which setting is best, how sure that is, and what became of them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ftlib import __version__
from ftlib.reporting import charts, html
from ftlib.reporting.collect import RunRecord
from ftlib.reporting.html import Node, group, note, section, tag
from ftlib.reporting.leaderboard import cross_table, effects, leaderboards, runs_table, spread_text
from ftlib.reporting.models import models_table
from ftlib.reporting.provenance import commands, cost, utc
from ftlib.reporting.settings import (
    CHOICE,
    REPORT,
    Setting,
    asked_unlike_rows,
    contests,
    trained_settings,
)
from ftlib.reporting.state import happened, state
from ftlib.reporting.tables import Table

COLOURS = 8
"""Settings that get a colour of their own; the best ones. The others share a grey."""


def tables_of(records: Sequence[RunRecord]) -> list[Table]:
    """Everything that the page says in numbers."""
    settings = trained_settings(records)
    beside = models_table(settings, [record for record in records if record.only_asked])
    trained = [*effects(settings), cross_table(settings), runs_table(settings)] if settings else []
    return [table for table in (*leaderboards(settings), beside, *trained) if table]


def render_several(records: Sequence[RunRecord], made: float) -> str:
    """The page.

    Args:
        records: two or more, from `collect.collect`.
        made: when, in seconds since 1970.
    """
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    settings = trained_settings(records)
    found = [section(table.title, table.node()) for table in tables_of(records)]
    names = ", ".join(dict.fromkeys(record.config.name for record in records))
    head = tag(
        "header",
        tag("h1", names, " ", tag("code", f"{len(records)} runs")),
        tag("p", census(records)),
        tag("p", best_sentence(settings), class_="headline"),
    )
    footer = tag("footer", f"Made {utc(made)} by ftlib {__version__}")
    main = tag("main", head, *found[:1], _curves(settings), *found[1:], _again(settings), footer)
    return html.document(f"{names}: {best_sentence(settings)}", css, main)


def census(records: Sequence[RunRecord]) -> str:
    """How many runs are in which state, how many models were only asked, and what all of that has cost."""
    counts = Counter(state(record)[0] for record in records if not record.only_asked)
    words = ", ".join(f"{number} {word}" for word, number in counts.most_common())
    asked = sum(record.only_asked for record in records)
    trained = f"{counts.total()} run{'s' * (counts.total() != 1)}: {words}"
    told = [trained] if counts else []
    told += [f"{asked} only asked, without training"] if asked else []
    return "; ".join(filter(None, [*told, happened(*records), cost(records)])) + "."


def best_sentence(settings: Sequence[Setting]) -> str:
    """The setting that valid chooses, and what test says of it; one for each contest."""
    if not settings:
        return "Models side by side, none of them trained here"
    found = [text for board in contests(settings) if (text := _best_of(board[0]))]
    if not found:
        return f"No scores on {CHOICE} after training yet: nothing to choose by"
    unlike = any(asked_unlike_rows([setting.runs for setting in board], CHOICE) for board in contests(settings))
    return f"Best on {CHOICE}: {' · '.join(found)}{' (of settings that were asked different rows)' * unlike}"


def _best_of(setting: Setting) -> str:
    chosen, reported = setting.spread(CHOICE), setting.spread(REPORT)
    if chosen is None:
        return ""
    told = f"; {REPORT} {spread_text(reported)}" if reported else ""
    return f"{setting.name} – {setting.metric} {spread_text(chosen)}{told}"


def _curves(settings: Sequence[Setting]) -> Node:
    curves = [
        (min(number, COLOURS), points)
        for number, setting in enumerate(settings)
        for run in setting.runs
        if (points := run.curve("loss"))
    ]
    if not curves:
        return group()
    legend = [_key(number, setting.name) for number, setting in enumerate(settings[:COLOURS])]
    if len(settings) > COLOURS:
        legend.append(_key(COLOURS, f"the other {len(settings) - COLOURS}"))
    chart = charts.overlay_chart(f"Loss of {len(curves)} runs", curves, 760, 320)
    mean = note("Training loss by optimizer step, a running mean of each run; runs of a colour differ in their seeds.")
    return section("Learning curves", tag("figure", chart, class_="large"), tag("p", *legend, class_="legend"), mean)


def _key(colour: int, name: str) -> Node:
    return tag("span", tag("i", class_=f"key of-{colour}"), name)


def _again(settings: Sequence[Setting]) -> Node:
    """The best run's config and the commands that make it anew, for each contest."""
    parts: list[Node] = []
    for board in contests(settings):
        run = board[0].best_run
        lead = note("The best setting's best run on ", CHOICE, ": ", tag("code", run.handle), ". Save as config.yaml:")
        parts += [lead, tag("pre", run.config_text), tag("pre", "\n".join(commands(run)))]
    return section("Do the best again", *parts) if parts else group()
