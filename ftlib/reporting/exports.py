"""A report's numbers for other programs: Markdown, and one CSV line per score."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from ftlib.reporting.collect import RunRecord
from ftlib.reporting.provenance import cost
from ftlib.reporting.scores import headline, metric_tables
from ftlib.reporting.settings import group_settings, trained_settings
from ftlib.reporting.several import best_sentence, census, tables_of
from ftlib.reporting.state import happened, state

_SCORE_COLUMNS = ["dataset", "split", "training", "metric", "value", "low", "high", "n", "main"]


def markdown(records: Sequence[RunRecord]) -> str:
    """The report's sentences and tables."""
    if len(records) > 1:
        head = [f"# {best_sentence(trained_settings(records))}", census(records)]
        parts = [*head, *[table.markdown() for table in tables_of(records)]]
    else:
        (record,) = records
        told = "; ".join(text for text in (*state(record), happened(record), cost(records)) if text)
        tables = [table.markdown() for table in metric_tables(record)]
        parts = [f"# {record.config.name}: {headline(record)}", told, *tables]
    return "\n\n".join(parts) + "\n"


def score_lines(records: Sequence[RunRecord]) -> str:
    """CSV (RFC 4180): a line for every metric of every evaluation, with the keys in which the runs differ.

    Empty cells stand for what is not there; `main` is 1 for the metric that settings are ranked by.
    """
    settings = group_settings(records)
    keys = list(settings[0].values)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["run", "seed", *keys, *_SCORE_COLUMNS])
    for setting in settings:
        for run in setting.runs:
            known = [run.handle, run.config.seed, *setting.values.values()]
            writer.writerows([[*known, *cells] for cells in _scores(run)])
    return out.getvalue()


def _scores(run: RunRecord) -> Iterator[list[Any]]:
    for split in run.splits:
        for when, evaluation in split.by_when.items():
            scores = evaluation.scores
            for name, found in scores["metrics"].items():
                low, high = found["interval"] or ("", "")
                value = "" if found["value"] is None else found["value"]
                place = [split.dataset, split.split, when, name]
                yield [*place, value, low, high, scores["n"], int(name == scores["metric"])]
