"""Submit a config's run, or all runs of its sweep, to Slurm as one array; or run them here.

Each run is staged, prepared, trained and evaluated. A run is identified by the config fields that affect its result:
submitting again only sends missing runs (never started, deleted, cancelled or lost). Executor local runs several at
once in the background on this machine; debug runs them sequentially before the command returns.
"""

from __future__ import annotations

import argparse

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.errors import EXIT_FAILURE


def main(argv: list[str]) -> int:
    """`ftlib submit CONFIG [KEY=VALUE…] [--executor …] [--then …] [--retry|--replace] [--dry-run] [--wait]`"""
    parsed = _parser().parse_intermixed_args(argv)
    from ftlib.config.loader import read_raw_config
    from ftlib.slurm.submit import SubmitOptions, submit, wait_for_runs

    options = SubmitOptions(parsed.executor, parsed.then, parsed.retry, parsed.replace, parsed.dry_run)
    source, site = read_raw_config(parsed.config, parsed.overrides), find_site()
    done = submit(source, site, options)
    if parsed.dry_run and done.runs:
        log.print_result(done.preview)
    elif done.runs:
        jobs = ", ".join(done.jobs)
        log.info(f"{len(done.runs)} submitted as {parsed.executor} job {jobs}; output in {done.folder}")
        log.print_result("\n".join(done.jobs))
    if parsed.wait and not parsed.dry_run:
        return 0 if wait_for_runs(source, site) else EXIT_FAILURE
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("submit", __doc__)
    command.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm")
    command.add_argument(
        "--then",
        type=_stages,
        default=(),
        metavar="evaluate,report",
        help="evaluate each run in a separate job after its training; report when all have ended",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument("--retry", action="store_true", help="also failed runs; they resume")
    again.add_argument("--replace", action="store_true", help="delete existing runs and start again")
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    command.add_argument(
        "--wait", action="store_true", help="wait for all runs of the config; exit code 0 if all have finished, else 1"
    )
    arguments.add_config_arguments(command)
    return command


def _stages(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if words not in (("evaluate",), ("report",), ("evaluate", "report")):
        raise argparse.ArgumentTypeError("must be evaluate, report, or evaluate,report")
    return words
