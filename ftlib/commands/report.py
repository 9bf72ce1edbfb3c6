"""One self-contained HTML page about a run, finished or not: scores, curves, answers with pictures, what was done."""

from __future__ import annotations

import time
from pathlib import Path

from ftlib import command_line, files, runs
from ftlib.reporting.collect import collect
from ftlib.reporting.page import render
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib report RUN [-o F]`"""
    command = command_line.parser("report", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command.add_argument("-o", "--output", metavar="F", type=Path, help="default: report.html in the run folder")
    parsed = command.parse_args(argv)
    site = find_site()
    run = runs.find_run(parsed.run, site)
    path = parsed.output or run.report
    files.write_text(path, render(collect(run, site), time.time()))
    print(path)
    return 0
