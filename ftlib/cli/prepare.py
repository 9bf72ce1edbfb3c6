"""Check a dataset (every row, every image) and split it into train, valid and test in the store."""

from __future__ import annotations

from ftlib import preparation
from ftlib.cli import arguments
from ftlib.core import log, signals
from ftlib.core.paths import find_site
from ftlib.data.dataset import find_prepared, source_changed
from ftlib.data.moved import match_existing_runs
from ftlib.data.summary import summary_lines, warning_lines
from ftlib.runs.pinning import exec_pinned_code
from ftlib.runs.run import run_for


def main(argv: list[str]) -> int:
    """`ftlib prepare CONFIG [KEY=VALUE…] [--check | --again]`"""
    command = arguments.make_parser("prepare", __doc__)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only check; write nothing")
    again = "read the current data again; existing runs keep their rows"
    how.add_argument("--again", action="store_true", help=again)
    arguments.add_config_arguments(command)
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    experiment = arguments.load_from_arguments(parsed, site)
    if parsed.check:
        log.print_result(preparation.check(experiment.config, site))
        return 0
    [experiment] = match_existing_runs([experiment], site)
    ahead = signals.following_command() == "prepare"  # `ftlib stage` calls this in a job
    if ahead and find_prepared(experiment.config, site, run_for(experiment, site)) is None:
        return 0
    # the code of a run that has started looks for the name that it gave the folder
    done = preparation.prepare(
        experiment, site, parsed.again, lambda run: exec_pinned_code(run, site, ["prepare", *argv])
    )
    if done.existed:
        log.info("already prepared")
        if source_changed(done.dataset, experiment.config):
            log.warning("the dataset's files have changed since; the existing run keeps these rows")
    for line in warning_lines(done.dataset, done.unshown):
        log.warning(line)
    for line in summary_lines(done.dataset, experiment.config):
        log.info(line)
    log.print_result(str(done.dataset.folder))
    if ahead:
        signals.notify_done("prepare")
    return 0
