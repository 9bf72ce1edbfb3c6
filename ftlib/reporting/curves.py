"""Loss, learning rate, gradient norm, speed, memory and scores on the way; where training was taken up again.

Attempts that diverged stand in the same charts, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    figures = [
        figure
        for figure in (
            _figure(steps, begins, "loss", "Loss", marks, large=True),
            _figure(steps, begins, "learning_rate", "Learning rate", marks, noisy=False),
            _figure(steps, begins, "grad_norm", "Gradient norm", marks),
            _figure(steps, begins, "seconds", "Seconds a step", marks),
            _figure(steps, begins, "memory_gib", "GPU memory, GiB", marks, noisy=False),
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
    """One for each split and metric that was asked in training."""
    asked = [line for line in record.metrics if "split" in line]
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
) -> Node | None:
    known = [line for line in lines if line.get(key) is not None and math.isfinite(line[key])]
    if not known:
        return None
    points = [(float(begins[line["attempt"]] + line["step"]), float(line[key])) for line in known]
    values = [value for _, value in points]
    log = noisy and charts.wants_log(values)
    last = f"{values[-1]:.4g} at step {known[-1]['step']:g}"
    size = (600, 330) if large else (400, 176)
    chart = charts.line_chart(f"{title} over {len(points)} steps; {last}", points, marks, noisy, *size)
    caption = tag("figcaption", tag("strong", title), " (log scale)" if log else "", tag("span", last))
    return tag("figure", caption, chart, class_="large" if large else "small")


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
