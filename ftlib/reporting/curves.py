"""Loss, learning rate and gradient norm over the steps, out of metrics.jsonl; restarts out of history.jsonl."""

from __future__ import annotations

from ftlib.reporting import charts
from ftlib.reporting.collect import RunRecord
from ftlib.reporting.html import Child, Node, note, section, tag


def curves_section(record: RunRecord) -> Node:
    """Three charts: the loss large, the others beside it."""
    marks = [event["step"] for event in record.starts if event.get("step", 0) > 0]
    figures = [
        figure
        for figure in (
            _figure(record, "loss", "Loss", marks, large=True),
            _figure(record, "learning_rate", "Learning rate", marks),
            _figure(record, "grad_norm", "Gradient norm", marks),
        )
        if figure
    ]
    if not figures:
        command = tag("code", f"ftlib train {record.folder / 'config.yaml'}")
        return section("Training", note("No training step has been logged yet. Run ", command, "."))
    return section("Training", tag("div", *figures, class_="charts"), *_legend(record, marks))


def _figure(record: RunRecord, key: str, title: str, marks: list[int], large: bool = False) -> Node | None:
    points = record.curve(key)
    if not points:
        return None
    values = [value for _, value in points]
    noisy = key != "learning_rate"
    log = noisy and charts.wants_log(values)
    last = f"{values[-1]:.4g} at step {points[-1][0]:g}"
    size = (600, 330) if large else (400, 176)
    chart = charts.line_chart(f"{title} over {len(points)} steps; {last}", points, marks, noisy, *size)
    caption = tag("figcaption", tag("strong", title), " (log scale)" if log else "", tag("span", last))
    return tag("figure", caption, chart, class_="large" if large else "small")


def _legend(record: RunRecord, marks: list[int]) -> list[Child]:
    parts: list[Child] = []
    reach = charts.smooth_window(len(record.metrics))
    if reach:
        mean = f"running mean over {2 * reach + 1} steps"
        parts.append(note(f"By optimizer step. Loss and gradient norm: pale, each step; strong, the {mean}."))
    if marks:
        steps = ", ".join(str(mark) for mark in marks)
        parts.append(note(f"▼ Dashed lines: training was taken up again from a checkpoint, at step {steps}."))
    return parts
