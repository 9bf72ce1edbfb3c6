"""Write a self-contained HTML page, with its numbers as Markdown and CSV beside it.

One run, finished or not: scores, curves, answers with images, provenance. Several runs, or a name that several runs
share, such as a sweep's: a ranking of settings with uncertainty, and the status of every run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.reports.exports import write_tensorboard, write_wandb
from ftlib.reports.report import output_file, read_run_records, write_report
from ftlib.runs.run import find_runs


def main(argv: list[str]) -> int:
    """`ftlib report RUN… [-o F] [--templates DIR] [--no-images] [--latex] [--tensorboard] [--wandb PROJECT]`"""
    command = arguments.make_parser("report", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder, its name, or the name of several runs")
    command.add_argument(
        "-o",
        "--output",
        metavar="F",
        type=Path,
        help="an .html file, or a folder; default: report.html in the run folder, or in the folder of the first name",
    )
    command.add_argument(
        "--templates", metavar="DIR", type=Path, help="jinja2 templates that replace ftlib's of the same name"
    )
    command.add_argument("--no-images", action="store_true", help="no images of the data in the page")
    command.add_argument("--latex", action="store_true", help="the table and methods paragraph of a paper too, as .tex")
    command.add_argument("--tensorboard", action="store_true", help="event files in every run folder too")
    command.add_argument("--wandb", metavar="PROJECT", help="an offline Weights & Biases run in every run folder too")
    parsed = command.parse_args(argv)
    site = find_site()
    output = output_file(parsed.output) if parsed.output else None
    records = read_run_records(find_runs(parsed.runs, site), site, not parsed.no_images)
    log.print_result(str(write_report(records, output, parsed.templates, parsed.latex)))
    if parsed.tensorboard:
        folders = [write_tensorboard(record) for record in log.track(records, "writing event files")]
        log.info(f"view them with: tensorboard --logdir {shlex.quote(str(_common_parent(folders)))}")
    if parsed.wandb:
        for record in log.track(records, "writing wandb runs"):
            log.info(f"send it with: wandb sync {shlex.quote(str(write_wandb(record, parsed.wandb)))}")
    return 0


def _common_parent(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders))
