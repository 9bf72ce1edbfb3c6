"""Render a run's record as one self-contained HTML page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ftlib import __version__
from ftlib.config.identity import describe_recipe
from ftlib.config.npz_checkpoints import describe_conversion
from ftlib.config.schema import LOSS
from ftlib.core.metric_table import describe_metric, metric_info_of_rule
from ftlib.core.registry import TASKS, provider
from ftlib.metrics.comparability import answer_settings, describe_differences, describe_settings, setting_differences
from ftlib.metrics.formatting import format_interval, format_value, unit_of
from ftlib.reports import charts
from ftlib.reports.gallery import answers_context
from ftlib.reports.html import Context, render_page
from ftlib.reports.run_record import EvaluationResult, RunRecord, SplitRecord, describe_state, interruptions, origin_of
from ftlib.reports.tables import NO_VALUE, Table
from ftlib.runs.usage import describe


def render(record: RunRecord, made: float, templates: Path | None = None) -> str:
    """Return the page.

    Args:
        record: from `run_record.read_run_record`.
        made: time of the report, in seconds since 1970.
        templates: a folder of templates that replace those of the same name.

    Raises:
        UserError: a template of that folder has an error.
    """
    state, detail = describe_state(record)
    return render_page(
        f"{record.config.name}: {headline(record)}",
        "run.html.j2",
        templates,
        name=record.config.name,
        identity=record.identity,
        state=state,
        detail=detail,
        headline=headline(record),
        subject=_subject(record),
        scores=scores_context(record),
        curves=curves_context(record),
        classes=classes_context(record),
        calibration=calibration_context(record),
        answers=answers_context(record),
        provenance=provenance_context(record),
        footer=f"Made {utc(made)} by ftlib {__version__} from {record.folder}",
    )


def _subject(record: RunRecord) -> str:
    config = record.config
    if record.evaluated_only:
        return f"Evaluates {config.model.base} ({origin_of(config.model.base)}). Task {config.task}."
    how = {"full": "all weights", "attention": "the attention weights"}.get(config.adapter.method)
    data = ", ".join(part.name for part in config.data.parts) or config.data.source
    conversion = describe_conversion(config.model.base)
    base = f"{config.model.base}, {conversion}," if conversion else config.model.base
    trained = f"Trains {how or f'a {config.adapter.method} adapter'} of {base} on {data}."
    recipe = describe_recipe(config, record.recipe)
    return f"{trained} Task {config.task}, seed {config.seed}, {config.effective_batch_size} rows per step.{recipe}"


# The headline sentence and the table of scores before and after training, with 95 % intervals.


def headline(record: RunRecord) -> str:
    """Return the run in one sentence: the first split's score, before → after training, with the config's settings."""
    if damaged := record.damaged_result:
        return f"{damaged.parent.name}: the scores after training are damaged"
    if not record.splits:
        others = describe_settings_of(record.other_splits)
        return f"Not evaluated with its config's settings, only with {others}" if others else "Not evaluated yet"
    first = record.splits[0]
    scores = first.latest.scores
    what, count = f"{first.split} {scores['metric']}", f"(n = {scores['n']})"
    if not first.after:
        return f"{what} {_value(scores)} before training {count}"
    comparable = first.before and not setting_differences(first.before.scores, first.after.scores)
    change = f"{_value(first.before.scores)} → " if first.before and comparable else ""
    return f"{what} {change}{_value(scores)} {count}"


def describe_settings_of(splits: Sequence[SplitRecord]) -> str:
    """Return the settings of evaluations that are not those of their run's config."""
    return "; ".join(dict.fromkeys(split.settings for split in splits))


def scores_context(record: RunRecord) -> Context:
    """Return one row per split and model; missing evaluations with the command to run."""
    evaluated = [*record.splits, *record.other_splits]
    limits = {_limit(split.latest.scores) for split in evaluated}
    limit = limits.pop() if len(limits) == 1 else None  # bars of one table have one axis
    metrics = sorted({split.latest.scores["metric"] for split in evaluated})
    source, several = record.config.data.source, len(metrics) > 1
    rows = [row for split in evaluated for row in _rows(split, source, several, limit)]
    return {
        "metrics": ", ".join(metrics),
        "axis": [f"{share * limit:g}" for share in (0, 0.5, 1)] if limit and any(row["bar"] for row in rows) else [],
        "rows": rows,
        "method": _method(evaluated[0].latest.scores) if evaluated else "",
        "details": [details for split in evaluated if (details := _details(split))],
        "warnings": [*_settings_remarks(record), *[text for split in evaluated for text in _warnings(split)]],
        "missing": list(_missing(record)),
    }


def metric_tables(record: RunRecord) -> list[Table]:
    """Return every metric of every split, before and after training."""
    return [table for split in (*record.splits, *record.other_splits) for table in _metric_tables(split)]


def _metric_tables(split: SplitRecord) -> list[Table]:
    """Return the metrics of all rows, then a table for each breakdown, such as `question type: how many`."""
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
    infos = [None if kind else metric_info_of_rule(split.latest.scores.get("rule", ""), name) for name in labels]
    if any(infos):
        headers.append("rule")
        rows = [[*row, describe_metric(info) if info else ""] for row, info in zip(rows, infos, strict=True)]
    title = f"{f'By {kind}' if kind else 'All metrics'} on {split.dataset} {split.split}"
    title += f" with {split.settings}" if split.settings else ""
    return Table(
        title, "l" + "rr" * len(whens) + "w" * any(map(bool, infos)), headers, rows, [f"n = {split.latest.scores['n']}"]
    )


def _details(split: SplitRecord) -> Context | None:
    """Return all metrics if there are several, the precision/recall curve if there is one, and all breakdowns."""
    whole, *breakdowns = _metric_tables(split)
    if len(whole.rows) + len(breakdowns) < 2:
        return None
    return {"whole": whole, "curves": list(_curves(list(split.by_when.values()))), "breakdowns": breakdowns}


def _metric_cells(scores: dict[str, Any], name: str) -> list[str]:
    found = scores["metrics"].get(name, {"value": None, "interval": None})
    value, interval = found["value"], found["interval"]
    unit = unit_of(scores, name)
    return [format_value(value, unit, 3), format_interval(interval, unit, 3)]


def _curves(whens: list[EvaluationResult]) -> Iterator[Context]:
    for evaluation in whens:
        if curve := evaluation.scores.get("precision_recall"):
            positive, chosen = evaluation.scores["settings"]["positive"], evaluation.scores["threshold"]
            title = f"Precision-recall curve of {positive!r} {evaluation.when} training"
            points = list(zip(curve["recall"], curve["precision"], strict=True))
            yield {
                "title": title,
                "threshold": f"{chosen['rule']} on {chosen['split']}",
                "chart": charts.unit_chart(title, points, 330, 250),
            }


def _rows(split: SplitRecord, own: str, several: bool, limit: float | None) -> Iterator[Context]:
    """Yield table rows: with several metrics, values have the metric's name; parts of a mixture follow the total.

    Args:
        limit: the end of the bars' axis, if there are bars.
    """
    name = split.split if split.dataset == own else f"{split.dataset} {split.split}"
    name += f" ({split.settings})" if split.settings else ""
    for when, evaluation in split.by_when.items():
        for part, scores in {"": evaluation.scores, **evaluation.scores.get("parts", {})}.items():
            interval, invalid = scores["interval"], scores.get("invalid")
            cut = scores.get("answers", {}).get("cut_off")
            yield {
                "name": f"{name} {part}".strip(),
                "when": when,
                "metric": f"{scores['metric']} " if several else "",
                "value": _value(scores),
                "bar": _bar(scores, when, limit),
                "interval": format_interval(interval, unit_of(scores, scores["metric"]), 3),
                "n": scores["n"],
                "invalid": NO_VALUE if invalid is None else invalid,
                "cut_off": NO_VALUE if cut is None else cut,
            }


def _limit(scores: dict[str, Any]) -> float | None:
    """Return the largest possible value of the headline; None if unknown."""
    info = metric_info_of_rule(scores.get("rule", ""), scores["metric"])
    if info:
        return info.upper
    return {"fraction": 1.0, "percent": 100.0}.get(unit_of(scores, scores["metric"]))


def _bar(scores: dict[str, Any], when: str, limit: float | None) -> str:
    """Return the bar; empty for undefined metrics, and without an interval or a limit."""
    value, interval = scores["value"], scores["interval"]
    if value is None or not limit or not interval or not 0 <= interval[0] <= value <= interval[1] <= limit:
        return ""
    low, high = interval
    told = f"{format_value(value, unit_of(scores, scores['metric']), 3)}, 95 % interval {low:.3f} to {high:.3f}"
    return charts.interval_bar(value / limit, low / limit, high / limit, when, told)


def _value(scores: dict[str, Any]) -> str:
    return format_value(scores["value"], unit_of(scores, scores["metric"]), 3)


def _method(scores: dict[str, Any]) -> str:
    info = metric_info_of_rule(scores.get("rule", ""), scores["metric"])
    told = [f"{scores['metric']}: {describe_metric(info)}"] if info else []
    told += [f"Intervals: {scores['interval_method']}"] if "interval_method" in scores else []
    return " ".join(f"{sentence}." for sentence in told)


def _settings_remarks(record: RunRecord) -> Iterator[str]:
    """Yield remarks about evaluations with other settings than the config's, and about damaged ones."""
    if record.other_splits:
        own = describe_settings(answer_settings(record.config.evaluation))
        yield (
            f"Rows with settings in parentheses are not comparable with the others, which have the config's: {own}. "
            "Headline, answers and rankings show the config's settings only."
        )
    for folder in record.damaged:
        yield f"{folder.relative_to(record.folder)}: the files are damaged and not shown; delete it and evaluate again."


def _warnings(split: SplitRecord) -> Iterator[str]:
    """Yield remarks: warnings, the paired test, and whether the scores are comparable (same rows and settings)."""
    where = f"{split.dataset} {split.split}" + (f" ({split.settings})" if split.settings else "")
    yield from (f"{where}: {remark}" for remark in split.latest.scores.get("remarks", []))
    if split.change:
        yield f"{where}: {split.change['sentence']}."
    if not (split.before and split.after):
        return
    yield from (f"{split.split}: {one}." for one in describe_differences(split.before.scores, split.after.scores))


def _missing(record: RunRecord) -> Iterator[Context]:
    if record.evaluated_only:
        return
    trained = any(split.after for split in record.splits)
    if not trained and not record.done:
        yield {"text": "There are no scores after training, because this run is not finished.", "command": ""}
    elif not trained:
        yield {"text": "There are no scores after training yet.", "command": f"ftlib evaluate {record.name}"}
    if not any(split.before for split in record.splits):
        text = "There are no scores of the base model for comparison."
        yield {"text": text, "command": f"ftlib evaluate {record.name} --before"}


# Classification in detail: the confusion matrix and precision, recall, F1 and support of every class.

MAX_CLASSES = 40
MAX_CONFUSIONS = 30
_LONG_LABEL = 4


def classes_context(record: RunRecord) -> list[Context]:
    """Return confusion matrix and scores by class of each split; empty for tasks without a confusion matrix."""
    return [
        _classes(split.split, split.latest) for split in record.splits if "confusion" in split.latest.scores["tables"]
    ]


def _classes(split: str, evaluation: EvaluationResult) -> Context:
    scores = evaluation.scores
    tables = scores["tables"]
    large = len(tables["classes"]) > MAX_CLASSES
    return {
        "title": f"{split} {evaluation.when} training, n = {scores['n']}",
        "matrix": None if large else _matrix(tables, bool(scores["invalid"])),
        "confusions": _frequent_confusions(tables) if large else None,
        "scores": _class_table(scores),
    }


def _matrix(tables: dict[str, Any], invalid: bool) -> Context:
    columns = tables["columns"] if invalid else tables["columns"][:-1]
    rows = zip(tables["classes"], tables["confusion"], strict=True)
    return {
        "columns": columns,
        "turned": any(len(label) > _LONG_LABEL for label in columns),
        "rows": [{"label": label, "cells": _matrix_cells(label, columns, counts)} for label, counts in rows],
    }


def _matrix_cells(label: str, columns: list[str], counts: list[int]) -> list[Context]:
    total, cells = sum(counts), []
    for column, count in zip(columns, counts, strict=False):
        right = label == column
        kind = "right" if right else "wrong" if count else "none"
        share = count / total if total else 0
        cells.append({"text": str(count) if count or right else "·", "kind": kind, "share": f"{share:.3f}"})
    return cells


def _frequent_confusions(tables: dict[str, Any]) -> Table:
    """Return the most frequent confusions, instead of a matrix that would be too large."""
    found = sorted(_confusions(tables), key=lambda item: -item[2])
    rows = [[expected, answer, str(count)] for expected, answer, count in found[:MAX_CONFUSIONS]]
    kinds = f"{len(rows)} most frequent of {len(found)} kinds of error"
    remark = f"The {kinds}; the whole matrix is too large to show."
    return Table("most frequent confusions", "llr", ["expected", "answer", "count"], rows, [remark])


def _confusions(tables: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    for label, counts in zip(tables["classes"], tables["confusion"], strict=True):
        for column, count in zip(tables["columns"], counts, strict=True):
            if count and column != label:
                yield label, column, count


def _class_table(scores: dict[str, Any]) -> Table:
    headers = ["class", "precision", "recall", "F1", "support"]
    rows = [_class_row(label, found) for label, found in scores["tables"]["classes"].items()]
    average = f"Macro F1 {scores['metrics']['macro F1']['value']:.3f}: the mean over the classes that occur."
    return Table("scores by class", "lrrrr", headers, rows, [average])


# Calibration of closed sets of answers: reliability diagram and expected calibration error.


def calibration_context(record: RunRecord) -> list[Context]:
    """Return a reliability diagram for each split of a task with a closed set of answers; none without confidences."""
    name = record.config.task
    plugin = provider("task", name, record.config.plugins)
    closed = plugin.registers["task"][name].get("closed_labels") if plugin else TASKS[name].closed_labels
    found = [_calibration(split.split, split.latest) for split in record.splits] if closed else []
    return [context for context in found if context]


def _calibration(split: str, evaluation: EvaluationResult) -> Context | None:
    rows = evaluation.predictions
    confidences = [share for row in rows if (share := _confidence(row)) is not None]
    if not rows or len(confidences) < len(rows):
        return None
    from ftlib.metrics.calibration import ADAPTIVE_ECE, BINS, ECE, calibration

    right = [row["prediction"] == row["references"][0].strip() for row in rows]
    found = calibration(confidences, right, [row.get("image") or row["id"] for row in rows])
    told = [
        f"{name} {value:.3f} (95 % interval {format_interval(interval, 'fraction', 3)})"
        for name, (value, interval) in ((name, found.errors[name]) for name in (ECE, ADAPTIVE_ECE))
    ]
    mean, most = found.expected
    told.append(f"mean confidence {found.confidence:.3f}, accuracy {found.accuracy:.3f}")
    calibrated = f"A perfectly calibrated model with these confidences has an ECE of {mean:.3f} on average"
    calibrated += f", below {most:.3f} in 95 % of cases"
    points = [
        charts.ReliabilityPoint(one.low, one.high, one.n / found.n, one.confidence, one.accuracy, one.interval)
        for one in found.bins
    ]
    by_place = {round(one.low * BINS): one for one in found.bins}
    lines = []
    for place in range(BINS):
        cells = ["0", NO_VALUE, NO_VALUE, NO_VALUE]
        if one := by_place.get(place):
            interval = format_interval(one.interval, "fraction", 3)
            cells = [str(one.n), f"{one.confidence:.3f}", f"{one.accuracy:.3f}", interval]
        lines.append([f"{place / BINS:.2f}–{(place + 1) / BINS:.2f}", *cells])
    origin = _ORIGIN["probabilities" in rows[0]]
    legend = "Dots: accuracy with its 95 % interval; dashed line: perfect calibration; bars: share of the rows."
    title = f"{split} {evaluation.when} training, n = {found.n}"
    headers = ["confidence", "rows", "mean", "accuracy", "95 % interval"]
    return {
        "title": title,
        "errors": f"{'; '.join(told)}. {calibrated}. {origin} {BINS} bins of equal width; adaptive: of equal size.",
        "legend": legend,
        "chart": charts.reliability_chart(f"Reliability diagram of {title}", points, 400, 320),
        "bins": Table("calibration by confidence", "lrrrr", headers, lines, []),
    }


_ORIGIN = {
    True: "Confidence: the probability of the answer among the labels.",
    False: "Confidence: the probability of the generated answer among all texts.",
}


def _confidence(row: dict[str, Any]) -> float | None:
    """Return the probability of a row's answer; None if it is unknown, as in evaluations by older versions."""
    if "probabilities" in row:
        share = row["probabilities"].get(row["prediction"])
        return None if share is None else min(1.0, float(share))
    if "mean_logprob" in row:
        return min(1.0, math.exp(row["mean_logprob"] * row["answer_tokens"]))
    return None


def _class_row(label: str, scores: dict[str, Any]) -> list[str]:
    """Return the row of a class; a class that never occurs has no recall."""
    if not scores["support"]:
        return [label, NO_VALUE, NO_VALUE, NO_VALUE, "0"]
    return [label, *[f"{scores[name]:.3f}" for name in ("precision", "recall", "f1")], str(scores["support"])]


# Provenance: data, config, environment of every start, history, and commands to reproduce the run.

_EVENT_FIELDS = ("event", "time", "step", "seconds")
_CHANGES = "+changes"


def provenance_context(record: RunRecord) -> Context:
    """Return the provenance section: data, config, environment, history, commands to reproduce."""
    return {
        "data": _data(record.data) if record.data else None,
        "config": record.config_text,
        "environment": _environment(record) if record.environments else None,
        "history": _history(record) if record.history else None,
        "cost": f"{'; '.join(filter(None, (cost([record]), describe(record.usage.time))))}.",
        "commands": "\n".join(commands(record)),
    }


def utc(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC, with seconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


def cost(records: Sequence[RunRecord]) -> str:
    """Return the GPU-hours of runs as text."""
    train = sum(record.usage.train for record in records)
    evaluate = sum(record.usage.evaluate for record in records)
    return f"{train + evaluate:.2f} GPU-hours ({train:.2f} of training, {evaluate:.2f} of evaluation)"


def _data(data: dict[str, Any]) -> Context:
    rule = ", ".join(f"{key} {value}" for key, value in data["rule"].items() if value is not None)
    labels = data["labels"]  # a dataset of very many has no list of them
    answers = "more than 10,000" if labels is None else f"{len(labels):,}"
    return {
        "splits": [
            {"name": split, "rows": f"{entry['rows']:,}", "fingerprint": entry["fingerprint"]}
            for split, entry in data["splits"].items()
        ],
        "remark": f"Source {data['source']}, {answers} different answers. Split by: {rule}.",
    }


def _environment(record: RunRecord) -> Table:
    attempts = [_environment_facts(entry) for entry in record.environments]
    names = list(dict.fromkeys(name for attempt in attempts for name in attempt))
    headers = ["", *[f"start {number}" for number in range(1, len(attempts) + 1)]]
    rows = [[name, *[attempt.get(name, NO_VALUE) for attempt in attempts]] for name in names]
    threads = (record.done or {}).get("threads")
    remarks = [f"The start that finished used {threads} CPU threads."] if threads else []
    return Table("environment", "l" * len(headers), headers, rows, remarks)


def _environment_facts(entry: dict[str, Any]) -> dict[str, str]:
    """Return the facts of an entry except its time; packages come last, one fact each."""
    facts = {key: _plain(value) for key, value in entry.items() if key not in ("time", "packages")}
    return {**facts, **entry.get("packages", {})}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _history(record: RunRecord) -> Table:
    headers = ["time (UTC)", "event", "step", "seconds", "details"]
    return Table("history", "llrrl", headers, [_history_row(event) for event in record.history])


def _history_row(event: dict[str, Any]) -> list[str]:
    details = {key: value for key, value in event.items() if key not in _EVENT_FIELDS and value is not None}
    text = ", ".join(f"{key}: {_plain(value)}" for key, value in details.items())
    numbers = [_plain(event.get(key, NO_VALUE)) for key in ("step", "seconds")]
    return [utc(event["time"]), event["event"], *numbers, text]


def commands(record: RunRecord) -> list[str]:
    """Return shell commands that reproduce this run, including evaluations and report."""
    extra = sorted({split.split for split in record.splits} - set(record.config.evaluation.splits))
    splits = [*record.config.evaluation.splits, *extra] if extra else []
    evaluate = ["ftlib", "evaluate", "config.yaml", *[word for split in splits for word in ("--split", split)]]
    steps = [f"ftlib {name} config.yaml" for name in ("stage", "prepare", "train")]
    return [*_checkout(record), *steps, shlex.join(evaluate), shlex.join(["ftlib", "report", record.config.name])]


def _checkout(record: RunRecord) -> list[str]:
    """Return the command that checks out the code of the last start."""
    code = record.environments[-1].get("code") if record.environments else None
    if not code:
        return []
    line = shlex.join(["git", "checkout", code.removesuffix(_CHANGES)])
    return [f"{line}   # the run's code had uncommitted changes"] if code.endswith(_CHANGES) else [line]


# Curves: training and valid loss, learning rate, gradient norm, speed, memory and scores during training.
#
# Marks show where training resumed. Diverged attempts are in the same charts, one after the other.


def curves_context(record: RunRecord) -> Context:
    """Return a large loss chart and small other charts."""
    begins = attempt_offsets(record)
    resumed = [begins[event["attempt"]] + event["step"] for event in record.starts if event["step"] > 0]
    marks = sorted({*resumed, *begins.values()} - {0})
    steps = [line for line in record.metrics if "loss" in line]
    losses = [line for line in record.metrics if _is_valid_loss(line)]
    figures = [
        _figure(steps, begins, "loss", "Loss", marks, large=True, on_valid=losses),
        _figure(steps, begins, "learning_rate", "Learning rate", marks, noisy=False),
        _figure(steps, begins, "grad_norm", "Gradient norm", marks),
        _figure(steps, begins, "seconds", "Seconds per step", marks),
        _figure(steps, begins, "memory_gib", "GPU memory, GiB", marks, noisy=False),
        _figure(losses, begins, "perplexity", "Perplexity on valid", marks, noisy=False),
        *_score_figures(record, begins, marks),
    ]
    return {
        "figures": [figure for figure in figures if figure],
        "remarks": list(_curve_remarks(record, resumed, begins)),
        "command": f"ftlib train {record.folder / 'config.yaml'}",
    }


def attempt_offsets(record: RunRecord) -> dict[int, int]:
    """Return attempt → total number of logged steps of earlier attempts."""
    last: dict[int, int] = {0: 0}
    for line in record.metrics:
        last[line["attempt"]] = max(last.get(line["attempt"], 0), line["step"])
    attempts = range(max([*last, *[event["attempt"] for event in record.starts]]) + 1)
    return {attempt: sum(last.get(other, 0) for other in range(attempt)) for attempt in attempts}


def _score_figures(record: RunRecord, begins: dict[int, int], marks: list[int]) -> list[Context | None]:
    """Return a chart for each split and metric evaluated during training; valid loss is in the training loss chart."""
    asked = [line for line in record.metrics if "split" in line and not _is_valid_loss(line)]
    figures = []
    for split, metric in dict.fromkeys((line["split"], line["metric"]) for line in asked):
        lines = [line for line in asked if (line["split"], line["metric"]) == (split, metric)]
        figures.append(_figure(lines, begins, "value", f"{metric} on {split}", marks, noisy=False))
    return figures


def _figure(
    lines: Sequence[dict[str, Any]],
    begins: dict[int, int],
    key: str,
    title: str,
    marks: list[int],
    large: bool = False,
    noisy: bool = True,
    on_valid: Sequence[dict[str, Any]] = (),
) -> Context | None:
    """Return a chart; `on_valid` are the lines of a second curve, with numbers in `value`."""
    points = _points(lines, begins, key)
    if not points:
        return None
    beside = _points(on_valid, begins, "value")
    log = noisy and charts.needs_log_scale([value for _, value in (*points, *beside)])
    last = _at(_known(lines, key)[-1], key)
    told = f"{title} over {len(points)} steps; {last}"
    if beside:
        known = _known(on_valid, "value")
        lowest = min(known, key=lambda line: float(line["value"]))
        last += f"; on valid {_at(known[-1], 'value')}, lowest {_at(lowest, 'value')}"
        told += f"; on valid, {len(beside)} times: {_at(known[-1], 'value')}, lowest {_at(lowest, 'value')}"
    size = (600, 330) if large else (400, 176)
    return {
        "title": title,
        "size": "large" if large else "small",
        "log": log,
        "on_valid": bool(beside),
        "last": last,
        "chart": charts.line_chart(told, points, marks, noisy, *size, beside),
    }


def _known(lines: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _points(lines: Sequence[dict[str, Any]], begins: dict[int, int], key: str) -> list[charts.Point]:
    return [(float(begins[line["attempt"]] + line["step"]), float(line[key])) for line in _known(lines, key)]


def _at(line: dict[str, Any], key: str) -> str:
    return f"{line[key]:.4g} at step {line['step']:g}"


def _is_valid_loss(line: dict[str, Any]) -> bool:
    return (line.get("split"), line.get("metric")) == ("valid", LOSS)


def _curve_remarks(record: RunRecord, resumed: list[int], begins: dict[int, int]) -> Iterator[str]:
    reach = charts.smooth_window(sum("loss" in line for line in record.metrics))
    if reach:
        mean = f"running mean over {2 * reach + 1} steps"
        yield f"By optimizer step. Loss, gradient norm and seconds: light, each step; dark, the {mean}."
    if any("memory_gib" in line for line in record.metrics):
        yield "GPU memory: peak reserved memory since the start, on the first GPU of a job."
    if resumed:
        steps = ", ".join(str(mark) for mark in resumed)
        where = f"from a checkpoint, at step {steps} ({interruptions(record)})"
        yield f"▼ Dashed lines: training resumed {where}."
    if len(begins) > 1:
        places = ", ".join(f"attempt {attempt} at {begins[attempt]}" for attempt in range(1, len(begins)))
        yield f"▼ Dashed lines: training diverged and restarted ({places}). Attempts are shown one after the other."
