"""One self-contained HTML page, with its numbers as Markdown and CSV beside it.

One run, finished or not: scores, curves, answers with pictures, what was done. Several runs, or a name that several
share, such as a sweep's: which setting is best and how sure that is, and what became of every run.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ftlib import command_line, console, files, runs
from ftlib.reporting.collect import RunRecord, collect
from ftlib.reporting.exports import markdown, score_lines
from ftlib.reporting.page import render
from ftlib.reporting.several import render_several
from ftlib.reporting.standing import standings_of
from ftlib.reporting.trackers import write_tensorboard, write_wandb
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib report RUN… [-o F] [--tensorboard] [--wandb PROJECT]`"""
    command = command_line.parser("report", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder, its name, or the name of several runs")
    command.add_argument(
        "-o",
        "--output",
        metavar="F",
        type=Path,
        help="default: report.html in the run folder, or in the folder of the first name",
    )
    command.add_argument("--tensorboard", action="store_true", help="event files in every run folder too")
    command.add_argument("--wandb", metavar="PROJECT", help="an offline Weights & Biases run in every run folder too")
    parsed = command.parse_args(argv)
    site = find_site()
    found = runs.find_runs(parsed.runs, site)
    standings = standings_of(found, site)
    pairs = zip(console.tracked(found, "reading runs"), standings, strict=True)
    records = [collect(run, site, standing) for run, standing in pairs]
    path = parsed.output or (found[0].report if len(found) == 1 else found[0].folder.parent / "report.html")
    _write(path, records)
    print(path)
    if parsed.tensorboard:
        folders = [write_tensorboard(record) for record in console.tracked(records, "writing event files")]
        console.say(f"look at them with: tensorboard --logdir {shlex.quote(str(_common(folders)))}")
    if parsed.wandb:
        for record in console.tracked(records, "writing wandb runs"):
            console.say(f"send it with: wandb sync {shlex.quote(str(write_wandb(record, parsed.wandb)))}")
    return 0


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders))


def _write(path: Path, records: Sequence[RunRecord]) -> None:
    page = render_several(records, time.time()) if len(records) > 1 else render(records[0], time.time())
    files.write_text(path.with_suffix(".md"), markdown(records))
    files.write_text(path.with_suffix(".csv"), score_lines(records))
    files.write_text(path, page)
