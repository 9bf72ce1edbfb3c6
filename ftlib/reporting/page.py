"""The report: a run's record in, one HTML page out that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from ftlib import __version__
from ftlib.identity import told_recipe
from ftlib.reporting import html
from ftlib.reporting.classes import classes_section
from ftlib.reporting.collect import RunRecord
from ftlib.reporting.curves import curves_section
from ftlib.reporting.gallery import gallery_section
from ftlib.reporting.html import Node, tag
from ftlib.reporting.models import origin_of
from ftlib.reporting.provenance import provenance_section, utc
from ftlib.reporting.scores import headline, scores_section
from ftlib.reporting.state import state


def render(record: RunRecord, made: float) -> str:
    """The page.

    Args:
        record: from `collect.collect`.
        made: when, in seconds since 1970.
    """
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = (scores_section, curves_section, classes_section, gallery_section, provenance_section)
    footer = tag("footer", f"Made {utc(made)} by ftlib {__version__} from {record.folder}")
    main = tag("main", _head(record), *[part(record) for part in sections], footer)
    return html.document(f"{record.config.name}: {headline(record)}", css, main)


def _head(record: RunRecord) -> Node:
    word, detail = state(record)
    badge = tag("span", word, class_=f"state {word.split()[0]}")
    name = tag("h1", record.config.name, " ", tag("code", record.identity))
    sentence = tag("p", headline(record), class_="headline")
    return tag("header", name, tag("p", badge, " ", detail), sentence, _subject(record))


def _subject(record: RunRecord) -> Node:
    config = record.config
    if record.only_asked:
        return html.note(f"Asks {config.model.base} ({origin_of(config.model.base)}). Task {config.task}.")
    how = {"full": "all weights", "attention": "the attention weights"}.get(config.adapter.method)
    data = ", ".join(part.name for part in config.data.parts) or config.data.source
    trained = f"Trains {how or f'a {config.adapter.method} adapter'} of {config.model.base} on {data}."
    recipe = told_recipe(config, record.recipe)
    return html.note(f"{trained} Task {config.task}, seed {config.seed}, {config.effective_batch} rows a step.{recipe}")
