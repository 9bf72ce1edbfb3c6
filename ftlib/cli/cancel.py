"""Cancel runs by name: queued runs are removed, running ones save and end. They stay cancelled until submitted
again."""

from __future__ import annotations

from ftlib import api
from ftlib.cli import arguments
from ftlib.core import log


def main(argv: list[str]) -> int:
    """`ftlib cancel RUN…`"""
    command = arguments.make_parser("cancel", __doc__)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folders or names; a name means all its runs")
    if not api.cancel(command.parse_args(argv).runs):
        log.info("nothing to cancel: none of these runs is queued or running")
    return 0
