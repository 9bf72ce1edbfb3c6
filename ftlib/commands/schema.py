"""Print the JSON Schema of a config, for editors that complete and check YAML."""

from __future__ import annotations

import json

from ftlib import command_line
from ftlib.config import Config


def main(argv: list[str]) -> int:
    """`ftlib schema`"""
    command_line.parser("schema", __doc__).parse_args(argv)
    print(json.dumps(Config.model_json_schema(), indent=1))
    return 0
