"""Write the report of runs: report.html, with its numbers as Markdown and CSV beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.reports.exports import markdown, score_lines
from ftlib.reports.latex import latex
from ftlib.reports.run_record import RunRecord, read_run_record
from ftlib.reports.run_report import render
from ftlib.reports.sweep_report import render_sweep
from ftlib.runs.run import Run
from ftlib.slurm.status import run_statuses


def read_run_records(runs: Sequence[Run], site: Site, images: bool = True) -> list[RunRecord]:
    """What a report shows of each run.

    Args:
        images: with pictures of the data.
    """
    pairs = zip(log.track(runs, "reading runs"), run_statuses(runs, site), strict=True)
    return [read_run_record(run, site, status, images) for run, status in pairs]


def output_file(path: Path) -> Path:
    """The page that an output names: an HTML file, or report.html in an existing folder.

    Raises:
        UserError: another file, which the numbers beside the page could overwrite.
    """
    if path.is_dir():
        return path / Run(path).report.name
    if path.suffix not in (".html", ".htm"):
        problem = f"{path}: a report is an HTML file, with .md and .csv beside it"
        raise UserError(problem, "Name a file that ends in .html, or an existing folder.")
    return path


def write_report(
    records: Sequence[RunRecord], path: Path | None = None, templates: Path | None = None, with_latex: bool = False
) -> Path:
    """Write a page about a run, or one that compares several.

    Args:
        path: an HTML file or an existing folder; default: report.html in the run folder; of several runs, in the folder
            of the first one's name.
        templates: a folder of jinja2 templates that replace ftlib's of the same name.
        with_latex: whether to write the table of a paper, as a .tex file.

    Returns:
        The page; beside it are a .md and a .csv file.

    Raises:
        UserError: see `output_file`; not writable.
    """
    first = Run(records[0].folder)
    path = (
        output_file(path) if path else (first.report if len(records) == 1 else first.folder.parent / first.report.name)
    )
    made = time.time()
    page = render_sweep(records, made, templates) if len(records) > 1 else render(records[0], made, templates)
    files.write_text(path.with_suffix(".md"), log.escape_control_characters(markdown(records)))
    files.write_text(path.with_suffix(".csv"), score_lines(records))
    if with_latex:
        files.write_text(path.with_suffix(".tex"), log.escape_control_characters(latex(records)))
    files.write_text(path, page)
    return path
