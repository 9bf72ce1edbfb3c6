"""The report: a run's record in, one HTML page out that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlib import __version__
from ftlib.reporting import html
from ftlib.reporting.classes import classes_section
from ftlib.reporting.collect import RunRecord
from ftlib.reporting.curves import curves_section
from ftlib.reporting.gallery import gallery_section
from ftlib.reporting.html import Node, tag
from ftlib.reporting.provenance import provenance_section, utc
from ftlib.reporting.scores import headline, scores_section


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


def state(record: RunRecord) -> tuple[str, str]:
    """How far the run is: a word or two, and a sentence."""
    if record.done:
        return "finished", _finish(record.done, record.divergences)
    go_on = f"ftlib train {record.folder / 'config.yaml'}"
    if not record.starts:
        return "not started", f"train it with: {go_on}"
    logged = f"last logged step {record.metrics[-1]['step']:,}" if record.metrics else "no step logged yet"
    failed = record.divergences
    if len(failed) > record.config.guard.restarts:
        return "diverged", f"in every attempt ({len(failed)}), at last: {failed[-1]['reason']}; no result was written"
    again = f"diverged {_times(len(failed))}, now attempt {len(failed)}, " if failed else ""
    return "not finished yet", f"{again}{logged}; go on with: {go_on}"


def _finish(done: dict[str, Any], failed: list[dict[str, Any]]) -> str:
    parts = [f"{done['step']:,} steps"]
    if best := done.get("best"):
        value = "undefined" if best["value"] is None else f"{best['value']:.4g}"
        parts.append(f"the result is of step {best['step']:,}, {best['metric']} on valid {value}")
    if failed:
        parts.append(f"attempt {len(failed)}: training had diverged {_times(len(failed))} before")
    return "; ".join(parts)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _subject(record: RunRecord) -> Node:
    config = record.config
    how = "all weights" if config.adapter.method == "full" else f"a {config.adapter.method} adapter"
    trained = f"Trains {how} of {config.model.base} on {config.data.source}."
    return html.note(f"{trained} Task {config.task}, seed {config.seed}, {config.effective_batch} rows a step.")
