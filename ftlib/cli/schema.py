"""Print the JSON Schema of a config, for completion and validation in editors; or the reference as Markdown."""

from __future__ import annotations

from ftlib.cli import arguments
from ftlib.config import reference
from ftlib.core import log


def main(argv: list[str]) -> int:
    """`ftlib schema [--markdown]`"""
    command = arguments.make_parser("schema", __doc__)
    command.add_argument("--markdown", action="store_true", help="all keys as tables, as in docs/config.md")
    if command.parse_args(argv).markdown:
        log.print_result(reference.markdown().rstrip("\n"))
    else:
        log.print_json(reference.json_schema(installed=True))
    return 0
