"""Cancel runs by name: what waits is dropped, what runs saves and ends. They stay cancelled until submitted again."""

from __future__ import annotations

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.runs.run import find_runs
from ftlib.slurm.cancel import cancel_runs


def main(argv: list[str]) -> int:
    """`ftlib cancel RUN…`"""
    command = arguments.make_parser("cancel", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folders or names; a name means all its runs")
    parsed = command.parse_args(argv)
    site = find_site()
    if not cancel_runs(find_runs(parsed.runs, site), site):
        log.info("nothing to cancel: none of these runs is queued or running")
    return 0
