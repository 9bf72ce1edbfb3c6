"""Write a self-contained HTML page, with its numbers as Markdown and CSV beside it.

One run, finished or not: scores, curves, answers with images, provenance. Several runs, or a name that several runs
share, such as a sweep's: a ranking of settings with uncertainty, and the status of every run.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli import arguments
from ftlib.core import files, log
from ftlib.core.paths import find_site
from ftlib.reports.exports import markdown, score_lines, write_tensorboard, write_wandb
from ftlib.reports.run_record import RunRecord, read_run_record
from ftlib.reports.run_report import render
from ftlib.reports.sweep_report import render_sweep
from ftlib.runs import run as runs
from ftlib.slurm.status import run_statuses


def main(argv: list[str]) -> int:
    """`ftlib report RUN… [-o F] [--templates DIR] [--no-images] [--tensorboard] [--wandb PROJECT]`"""
    command = arguments.make_parser("report", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder, its name, or the name of several runs")
    command.add_argument(
        "-o",
        "--output",
        metavar="F",
        type=Path,
        help="default: report.html in the run folder, or in the folder of the first name",
    )
    command.add_argument(
        "--templates", metavar="DIR", type=Path, help="jinja2 templates that replace ftlib's of the same name"
    )
    command.add_argument("--no-images", action="store_true", help="no images of the data in the page")
    command.add_argument("--tensorboard", action="store_true", help="event files in every run folder too")
    command.add_argument("--wandb", metavar="PROJECT", help="an offline Weights & Biases run in every run folder too")
    parsed = command.parse_args(argv)
    site = find_site()
    found = runs.find_runs(parsed.runs, site)
    standings = run_statuses(found, site)
    pairs = zip(log.track(found, "reading runs"), standings, strict=True)
    records = [read_run_record(run, site, standing, not parsed.no_images) for run, standing in pairs]
    path = parsed.output or (found[0].report if len(found) == 1 else found[0].folder.parent / "report.html")
    _write(path, records, parsed.templates)
    log.print_result(str(path))
    if parsed.tensorboard:
        folders = [write_tensorboard(record) for record in log.track(records, "writing event files")]
        log.info(f"view them with: tensorboard --logdir {shlex.quote(str(_common_parent(folders)))}")
    if parsed.wandb:
        for record in log.track(records, "writing wandb runs"):
            log.info(f"send it with: wandb sync {shlex.quote(str(write_wandb(record, parsed.wandb)))}")
    return 0


def _common_parent(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders))


def _write(path: Path, records: Sequence[RunRecord], templates: Path | None) -> None:
    made = time.time()
    page = render_sweep(records, made, templates) if len(records) > 1 else render(records[0], made, templates)
    files.write_text(path.with_suffix(".md"), log.escape_control_characters(markdown(records)))
    files.write_text(path.with_suffix(".csv"), score_lines(records))
    files.write_text(path, page)
