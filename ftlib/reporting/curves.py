"""Loss in training and on valid, learning rate, gradient norm, speed, memory and scores on the way.

Marks stand where training was taken up again. Attempts that diverged stand in the same charts, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ftlib.config_base import LOSS
from ftlib.reporting import charts
from ftlib.reporting.collect import RunRecord
from ftlib.reporting.html import Child, Node, note, section, tag
from ftlib.reporting.state import happened


def curves_section(record: RunRecord) -> Node:
    """The loss large, the other charts beside it."""
    begins = attempt_begins(record)
    resumed = [begins[event["attempt"]] + event["step"] for event in record.starts if event["step"] > 0]
    marks = sorted({*resumed, *begins.values()} - {0})
    steps = [line for line in record.metrics if "loss" in line]
    losses = [line for line in record.metrics if _is_valid_loss(line)]
    figures = [
        figure
        for figure in (
            _figure(steps, begins, "loss", "Loss", marks, large=True, on_valid=losses),
            _figure(steps, begins, "learning_rate", "Learning rate", marks, noisy=False),
            _figure(steps, begins, "grad_norm", "Gradient norm", marks),
            _figure(steps, begins, "seconds", "Seconds a step", marks),
            _figure(steps, begins, "memory_gib", "GPU memory, GiB", marks, noisy=False),
            _figure(losses, begins, "perplexity", "Perplexity on valid", marks, noisy=False),
            *_score_figures(record, begins, marks),
        )
        if figure
    ]
    if not figures:
        command = tag("code", f"ftlib train {record.folder / 'config.yaml'}")
        return section("Training", note("No training step has been logged yet. Run ", command, "."))
    return section("Training", tag("div", *figures, class_="charts"), *_legend(record, resumed, begins))


def attempt_begins(record: RunRecord) -> dict[int, int]:
    """Attempt → how many steps the attempts before it logged, all together."""
    last: dict[int, int] = {0: 0}
    for line in record.metrics:
        last[line["attempt"]] = max(last.get(line["attempt"], 0), line["step"])
    attempts = range(max([*last, *[event["attempt"] for event in record.starts]]) + 1)
    return {attempt: sum(last.get(other, 0) for other in range(attempt)) for attempt in attempts}


def _score_figures(record: RunRecord, begins: dict[int, int], marks: list[int]) -> list[Node | None]:
    """One for each split and metric that was asked in training; the loss on valid stands beside that of training."""
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
) -> Node | None:
    """A curve; `on_valid` are the lines of a second one, whose numbers are under `value`."""
    points = _points(lines, begins, key)
    if not points:
        return None
    beside = _points(on_valid, begins, "value")
    log = noisy and charts.wants_log([value for _, value in (*points, *beside)])
    last = _at(_known(lines, key)[-1], key)
    told = f"{title} over {len(points)} steps; {last}"
    keys: list[Child] = []
    if beside:
        known = _known(on_valid, "value")
        lowest = min(known, key=lambda line: float(line["value"]))
        last += f"; on valid {_at(known[-1], 'value')}, lowest {_at(lowest, 'value')}"
        told += f"; on valid, {len(beside)} times: {_at(known[-1], 'value')}, lowest {_at(lowest, 'value')}"
        keys = [tag("i", class_="key training"), "training", tag("i", class_="key valid"), "valid"]
    size = (600, 330) if large else (400, 176)
    chart = charts.line_chart(told, points, marks, noisy, *size, beside)
    caption = tag("figcaption", tag("strong", title), " (log scale)" if log else "", *keys, tag("span", last))
    return tag("figure", caption, chart, class_="large" if large else "small")


def _known(lines: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _points(lines: Sequence[dict[str, Any]], begins: dict[int, int], key: str) -> list[charts.Point]:
    return [(float(begins[line["attempt"]] + line["step"]), float(line[key])) for line in _known(lines, key)]


def _at(line: dict[str, Any], key: str) -> str:
    return f"{line[key]:.4g} at step {line['step']:g}"


def _is_valid_loss(line: dict[str, Any]) -> bool:
    return (line.get("split"), line.get("metric")) == ("valid", LOSS)


def _legend(record: RunRecord, resumed: list[int], begins: dict[int, int]) -> list[Child]:
    parts: list[Child] = []
    reach = charts.smooth_window(sum("loss" in line for line in record.metrics))
    if reach:
        mean = f"running mean over {2 * reach + 1} steps"
        parts.append(note(f"By optimizer step. Loss, gradient norm and seconds: pale, each step; strong, the {mean}."))
    if any("memory_gib" in line for line in record.metrics):
        parts.append(note("GPU memory: the most that was reserved since the start, on the first GPU of a job."))
    if resumed:
        steps = ", ".join(str(mark) for mark in resumed)
        parts.append(
            note(
                f"▼ Dashed lines: training was taken up again from a checkpoint, at step {steps} ({happened(record)})."
            )
        )
    if len(begins) > 1:
        places = ", ".join(f"attempt {attempt} at {begins[attempt]}" for attempt in range(1, len(begins)))
        parts.append(
            note(
                f"▼ Dashed lines: training had diverged and began anew ({places}). Attempts stand one behind the other."
            )
        )
    return parts
