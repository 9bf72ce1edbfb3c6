"""What was done: data, config, environment of every attempt, history, and the commands that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from ftlib.reporting.collect import RunRecord
from ftlib.reporting.html import Child, Node, folded, group, note, section, table, tag
from ftlib.reporting.scores import NONE

_EVENT_FIELDS = ("event", "time", "step", "seconds")
_CHANGES = "+changes"


def provenance_section(record: RunRecord) -> Node:
    """The tail of the report, for who has to believe or repeat it."""
    config = folded("Config (config.yaml)", tag("pre", record.config_text))
    parts = [_data(record), config, _environment(record), _history(record), note(f"{cost([record])}."), _again(record)]
    return section("What was done", *parts)


def utc(seconds: float) -> str:
    """A time as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


def cost(records: Sequence[RunRecord]) -> str:
    """The GPU-hours of runs, in words."""
    train = sum(record.usage.train for record in records)
    evaluate = sum(record.usage.evaluate for record in records)
    return f"{train + evaluate:.2f} GPU-hours ({train:.2f} of training, {evaluate:.2f} of evaluation)"


def _data(record: RunRecord) -> Node:
    title = tag("h3", "Data")
    if record.data is None:
        return group(title, note("Not fixed yet: a run takes down its data when its training begins."))
    headers = ["split", "rows", "fingerprint"]
    splits = record.data["splits"].items()
    rows = [[split, f"{entry['rows']:,}", tag("code", entry["fingerprint"])] for split, entry in splits]
    rule = ", ".join(f"{key} {value}" for key, value in record.data["rule"].items() if value is not None)
    labels = record.data["labels"]  # a dataset of very many has no list of them
    answers = "very many" if labels is None else f"{len(labels):,}"
    source = note(f"Source {record.data['source']}, {answers} different answers. Split by: {rule}.")
    return group(title, table("data", "lrl", headers, rows), source)


def _environment(record: RunRecord) -> Node:
    title = tag("h3", "Environment")
    if not record.environments:
        return group(title, note("No training has been started yet."))
    attempts = [_environment_facts(entry) for entry in record.environments]
    names = list(dict.fromkeys(name for attempt in attempts for name in attempt))
    headers = ["", *[f"start {number}" for number in range(1, len(attempts) + 1)]]
    rows = [[name, *[attempt.get(name, NONE) for attempt in attempts]] for name in names]
    threads = (record.done or {}).get("threads")
    remark = [note(f"The start that finished computed with {threads} CPU threads.")] if threads else []
    return group(title, table("environment", "l" * len(headers), headers, rows), *remark)


def _environment_facts(entry: dict[str, Any]) -> dict[str, str]:
    """Everything that an entry tells beside when it was; packages one by one, at the end."""
    facts = {key: _plain(value) for key, value in entry.items() if key not in ("time", "packages")}
    return {**facts, **entry.get("packages", {})}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _history(record: RunRecord) -> Node:
    title = tag("h3", "History")
    if not record.history:
        return group(title, note("Nothing has happened yet."))
    headers = ["time (UTC)", "event", "step", "seconds", "details"]
    return group(title, table("history", "llrrl", headers, [_history_row(event) for event in record.history]))


def _history_row(event: dict[str, Any]) -> list[Child]:
    details = {key: value for key, value in event.items() if key not in _EVENT_FIELDS and value is not None}
    text = ", ".join(f"{key}: {_plain(value)}" for key, value in details.items())
    return [utc(event["time"]), event["event"], *[_plain(event.get(key, NONE)) for key in ("step", "seconds")], text]


def _again(record: RunRecord) -> Node:
    lead = "Save the config above as config.yaml; then, in an empty store:"
    lines = "\n".join(commands(record))
    rest = "In the store that holds this run, the same commands go on with it, or say that it is done."
    return group(tag("h3", "Do it again"), note(lead), tag("pre", lines), note(rest))


def commands(record: RunRecord) -> list[str]:
    """Shell commands that make this run anew, evaluations and report included."""
    extra = sorted({split.split for split in record.splits} - set(record.config.evaluation.splits))
    splits = [*record.config.evaluation.splits, *extra] if extra else []
    evaluate = ["ftlib", "evaluate", "config.yaml", *[word for split in splits for word in ("--split", split)]]
    steps = [f"ftlib {name} config.yaml" for name in ("stage", "prepare", "train")]
    return [*_checkout(record), *steps, shlex.join(evaluate), shlex.join(["ftlib", "report", record.config.name])]


def _checkout(record: RunRecord) -> list[str]:
    """The code of the last start."""
    code = record.environments[-1].get("code") if record.environments else None
    if not code:
        return []
    line = shlex.join(["git", "checkout", code.removesuffix(_CHANGES)])
    return [f"{line}   # the run's code had changes that were never committed"] if code.endswith(_CHANGES) else [line]
