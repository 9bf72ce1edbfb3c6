"""The headline sentence and the table of scores before and after training, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ftlib.metrics.likeness import unlike
from ftlib.reporting import charts
from ftlib.reporting.collect import Evaluation, RunRecord, SplitRecord
from ftlib.reporting.html import Child, Node, folded, group, note, section, table, tag
from ftlib.reporting.tables import Table

NONE = "–"


def headline(record: RunRecord) -> str:
    """The run in one sentence: the first split's score, before → after training."""
    if not record.splits:
        return "Not evaluated yet"
    first = record.splits[0]
    scores = first.latest.scores
    what, count = f"{first.split} {scores['metric']}", f"(n = {scores['n']})"
    if not first.after:
        return f"{what} {_value(scores)} before training {count}"
    change = f"{_value(first.before.scores)} → " if first.before else ""
    return f"{what} {change}{_value(scores)} {count}"


def scores_section(record: RunRecord) -> Node:
    """One row per split and model; what is missing is said with the command that brings it."""
    parts: list[Child] = []
    if record.splits:
        parts += [_table(record), note(_method(record.splits[0].latest.scores))]
        parts += [_details(split) for split in record.splits]
    parts += [note(text) for split in record.splits for text in _warnings(split)]
    parts += [note(*children) for children in _missing(record)]
    return section("Scores", *parts)


def _table(record: RunRecord) -> Node:
    metrics = sorted({split.latest.scores["metric"] for split in record.splits})
    axis = tag("span", *[tag("span", end) for end in ("0", "0.5", "1")], class_="bar-axis")
    headers: list[Child] = ["split", "training", ", ".join(metrics), axis, "95 % interval", "n", "invalid answers"]
    rows = [row for split in record.splits for row in _rows(split, record.config.data.source, len(metrics) > 1)]
    return table("scores", "llrlrrr", headers, rows)


def metric_tables(record: RunRecord) -> list[Table]:
    """Every metric of every split, before and after training."""
    return [table for split in record.splits for table in _metric_tables(split)]


def _metric_tables(split: SplitRecord) -> list[Table]:
    """The metrics of all rows, then a table for each breakdown, such as `question type: how many`."""
    kinds: dict[str, dict[str, str]] = {"": {}}
    for name in dict.fromkeys(name for one in split.by_when.values() for name in one.scores["metrics"]):
        kind, colon, label = name.partition(": ")
        kinds.setdefault(kind if colon else "", {})[name] = label or name
    return [_metric_table(split, kind, labels) for kind, labels in kinds.items()]


def _metric_table(split: SplitRecord, kind: str, labels: dict[str, str]) -> Table:
    whens = list(split.by_when.values())
    headers = [kind or "metric"]
    for evaluation in whens:
        headers += [f"{evaluation.when} training", "95 % interval"]
    rows = [
        [text, *[cell for one in whens for cell in _metric_cells(one.scores, name)]] for name, text in labels.items()
    ]
    title = f"{f'By {kind}' if kind else 'All metrics'} on {split.dataset} {split.split}"
    return Table(title, "l" + "rr" * len(whens), headers, rows, [f"n = {split.latest.scores['n']}"])


def _details(split: SplitRecord) -> Node:
    """Every metric, if there are several; the precision/recall curve if there is one; every breakdown."""
    whole, *breakdowns = _metric_tables(split)
    if len(whole.rows) + len(breakdowns) < 2:
        return group()
    curves = tag("div", *_curves(list(split.by_when.values())), class_="pair")
    return group(folded(whole.title, whole.node(), curves), *[folded(one.title, one.node()) for one in breakdowns])


def _metric_cells(scores: dict[str, Any], name: str) -> list[str]:
    found = scores["metrics"].get(name, {"value": None, "interval": None})
    value, interval = found["value"], found["interval"]
    return [NONE if value is None else f"{value:.3f}", f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else NONE]


def _curves(whens: list[Evaluation]) -> Iterator[Node]:
    for evaluation in whens:
        if curve := evaluation.scores.get("precision_recall"):
            positive, chosen = evaluation.scores["settings"]["positive"], evaluation.scores["threshold"]
            title = f"Precision over recall of {positive!r} {evaluation.when} training"
            points = list(zip(curve["recall"], curve["precision"], strict=True))
            chart = charts.unit_chart(title, points, 330, 250)
            caption = tag("figcaption", tag("strong", title), tag("span", f"{chosen['rule']} on {chosen['split']}"))
            yield tag("figure", caption, chart)


def _rows(split: SplitRecord, own: str, several: bool) -> Iterator[list[Child]]:
    """With several metrics in the table, each value says which it is. Parts of a mixture stand below the whole."""
    name = split.split if split.dataset == own else f"{split.dataset} {split.split}"
    for evaluation in (split.before, split.after):
        if evaluation:
            for part, scores in {"": evaluation.scores, **evaluation.scores.get("parts", {})}.items():
                metric = f"{scores['metric']} " if several else ""
                value = group(metric, tag("strong", _value(scores)))
                yield [f"{name} {part}".strip(), evaluation.when, value, *_cells(replace(evaluation, scores=scores))]


def _cells(evaluation: Evaluation) -> list[Child]:
    scores = evaluation.scores
    invalid = scores.get("invalid")
    return [
        _bar(scores, evaluation.when),
        "–".join(f"{end:.3f}" for end in scores["interval"]) if scores["interval"] else NONE,
        str(scores["n"]),
        NONE if invalid is None else str(invalid),
    ]


def _bar(scores: dict[str, Any], when: str) -> Node:
    """Metrics that leave 0…1, such as CIDEr, and undefined ones have no bar."""
    value, interval = scores["value"], scores["interval"]
    if value is None or not interval or not 0 <= interval[0] <= value <= interval[1] <= 1:
        return group(NONE)
    low, high = interval
    return charts.interval_bar(value, low, high, when, f"{value:.3f}, 95 % interval {low:.3f} to {high:.3f}")


def _value(scores: dict[str, Any]) -> str:
    return NONE if scores["value"] is None else f"{scores['value']:.3f}"


def _method(scores: dict[str, Any]) -> str:
    return f"Intervals: {scores['interval_method']}." if "interval_method" in scores else ""


def _warnings(split: SplitRecord) -> Iterator[str]:
    """What must be said beside the numbers. Scores can only be compared if the same rows were asked the same way."""
    where = f"{split.dataset} {split.split}"
    yield from (f"{where}: {remark}" for remark in split.latest.scores.get("remarks", []))
    if split.change:
        yield f"{where}: {split.change['sentence']}."
    if not (split.before and split.after):
        return
    for key, (before, after) in unlike(split.before.scores, split.after.scores).items():
        change = f"{before} before, {after} after"
        yield f"{split.split}: the two scores are not comparable: the {key} differs ({change})."


def _missing(record: RunRecord) -> Iterator[list[Child]]:
    if record.only_asked:
        return
    trained = any(split.after for split in record.splits)
    if not trained and not record.done:
        yield ["There are no scores after training, since this run is not finished."]
    elif not trained:
        yield ["There are no scores after training yet. Run ", tag("code", f"ftlib evaluate {record.handle}"), "."]
    if not any(split.before for split in record.splits):
        before = tag("code", f"ftlib evaluate {record.handle} --before")
        yield ["There are no scores of the untrained model to compare with. Run ", before, "."]
