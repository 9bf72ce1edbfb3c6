"""Find likely wrong labels and near-duplicate images of a dataset with a closed set of answers.

CONFIG: cross-validation. Each fold is judged by a model that was trained on the others; the runs have the config's
name with -audit. --executor slurm submits the missing runs as one array, local and debug train them here; when they
are done, the same command writes the page. RUN: the runs of this name; of a single run only valid and test are judged.

Written are a page with pictures, a CSV file to correct, and one of near-duplicates. --apply writes the dataset with a
corrected CSV file as JSONL.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path

from ftlib.cli import arguments
from ftlib.config.loader import RawConfig, load_experiment, read_raw_config, set_field
from ftlib.core import files, log
from ftlib.core.paths import Site, find_site
from ftlib.errors import UserError
from ftlib.runs.run import Run, find_runs, run_for

_OF_OTHER_FILES = {"files": "{}", "columns": "{}", "splits": "{}", "encoding": "utf-8"}
"""Keys of `data` that describe the files of the dataset → what fits the corrected one."""


def main(argv: list[str]) -> int:
    """`ftlib audit RUN|CONFIG [KEY=VALUE…] [--folds K] [--executor …] [--apply CSV] [-o F]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    runs = _runs(parsed, site)
    if runs is None:
        return 0
    from ftlib.reports import audit

    if parsed.apply:
        return _apply(parsed, runs[0], site)
    found = audit.audit_runs(runs, site, not parsed.no_duplicates)
    page = parsed.output or runs[0].folder.parent / "audit.html"
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"{page}: an audit is an HTML file", "Name a file that ends in .html.")
    written = audit.write_audit(found, page)
    pairs = "" if found.pairs is None else f"; {len(found.pairs):,} pairs of near-duplicates in different splits"
    log.info(f"{audit.headline(found)}{pairs}")
    for path in written:
        if path:
            log.info(f"written: {path}")
    log.print_result(str(page))
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("audit", __doc__)
    command.add_argument("run", metavar="RUN|CONFIG", help="run folder, name of runs, or a config file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a field of a CONFIG")
    command.add_argument("--folds", metavar="K", type=int, default=5, help="folds of a CONFIG's data (default: 5)")
    command.add_argument(
        "--executor", choices=("slurm", "local", "debug"), help="train and evaluate a CONFIG's missing runs, as submit"
    )
    command.add_argument("--no-duplicates", action="store_true", help="do not compare images")
    command.add_argument("--apply", metavar="CSV", type=Path, help="write the dataset with these corrections to -o")
    command.add_argument(
        "-o", "--output", metavar="F", type=Path, help="an .html file; default: audit.html in the folder of the runs"
    )
    return command


def _runs(parsed: argparse.Namespace, site: Site) -> list[Run] | None:
    """Return the runs to audit by; None if they were submitted and are not finished yet.

    Raises:
        UserError: runs are missing, and no executor is given.
    """
    if not Path(parsed.run).is_file():
        if parsed.overrides or parsed.executor:
            raise UserError(f"{parsed.run}: is a run; KEY=VALUE and --executor are for a CONFIG")
        return [run for run in find_runs([parsed.run], site) if run.done_marker.exists()] or _nothing(parsed.run)
    if parsed.folds < 2:
        raise UserError(f"--folds: must be at least 2, got {parsed.folds}")
    from ftlib.slurm.submit import SubmitOptions, submit
    from ftlib.slurm.sweep import expand_sweep

    source = _folds(read_raw_config(Path(parsed.run), parsed.overrides), parsed.folds)
    if parsed.executor:
        done = submit(source, site, SubmitOptions(parsed.executor))
        if done.runs and parsed.executor != "debug":
            log.info(f"{len(done.runs)} runs submitted: {', '.join(done.jobs)}. When they are done, run it again.")
            return None
    runs = [run_for(member.experiment, site) for member in expand_sweep(source, site)]
    if missing := [run for run in runs if not run.done_marker.exists()]:
        remedy = "Add --executor slurm to submit them as one array, or --executor debug to train them here."
        raise UserError(f"{len(missing)} of {len(runs)} runs of the cross-validation are not trained", remedy)
    return runs


def _nothing(name: str) -> list[Run]:
    raise UserError(f"{name}: no run of this name is trained", f"Its state: ftlib status {name}")


def _folds(source: RawConfig, folds: int) -> RawConfig:
    """Return the config as a sweep over folds whose evaluations have the probabilities of all labels."""
    where = "--folds"
    if source.data.get("sweep"):
        raise UserError(f"{source.path}: has a sweep; audit makes its own, over the folds", "Add sweep=null.")
    data = source.data.get("data")
    rule = data.get("split") if isinstance(data, dict) else None
    tested = not isinstance(rule, dict) or rule.get("test", 0.1) != 0
    for key, value in {
        "name": f"{source.data.get('name', '')}-audit",
        "data.split.folds": folds,
        "evaluation.decode": "choose",
        "evaluation.before": False,
        "evaluation.splits": ["valid", "test"] if tested else ["valid"],
        "sweep": {"data.split.fold": list(range(1, folds + 1))},
    }.items():
        set_field(source.data, source.locations, key, value, where)
    return source


def _apply(parsed: argparse.Namespace, run: Run, site: Site) -> int:
    from ftlib.data.sources.registry import annotation_files
    from ftlib.reports import audit

    data = (config := load_experiment(run.config_file, [], site).config).data
    target, root = (path.resolve() for path in (parsed.output or Path(), Path(data.root)))
    if target.suffix != ".jsonl" or not target.is_relative_to(root):
        raise UserError(f"--apply needs -o FILE.jsonl, in the dataset's folder: {data.root}")
    own: list[Path] = []
    with contextlib.suppress(UserError):  # the dataset's files may be gone; its prepared rows are there
        own = annotation_files(data)
    if target in {path.resolve() for path in own}:
        raise UserError(f"{parsed.output}: is a file of the dataset, which is not changed", "Name another file.")
    text, changed, dropped = audit.corrected_rows(config, site, run, parsed.apply)
    files.write_text(parsed.output, text, urls=False)  # rows as they are
    log.info(f"{changed} labels changed, {dropped} rows left out")
    others = [f"data.{key}={value}" for key, value in _OF_OTHER_FILES.items() if getattr(data, key)]
    place = target.relative_to(root).as_posix()
    fields = ["data.source=jsonl", f"data.root={data.root}", f"data.file={place}", *others]
    log.info(f"use it with: {shlex.join(fields)}")
    log.print_result(str(parsed.output))
    return 0
