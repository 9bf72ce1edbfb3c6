"""Write a run's result as a whole model: an adapter is added to its base, so that transformers loads it without PEFT.

Needs no GPU and little memory. Run it again after an interruption to resume.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.core.signals import raise_on_signal


def main(argv: list[str]) -> int:
    """`ftlib export RUN -o OUTPUT [--dtype DTYPE]`"""
    command = arguments.make_parser("export", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name, or the folder of an adapter")
    command.add_argument("-o", "--output", metavar="OUTPUT", type=Path, required=True, help="folder of the model")
    types = ("float32", "float16", "bfloat16")
    command.add_argument("--dtype", choices=types, help="of the weights (default: as the base is stored)")
    parsed = command.parse_args(argv)
    site = find_site()
    from ftlib.merging.export import export

    with raise_on_signal():
        output = export(parsed.run, parsed.output, parsed.dtype, site)
    log.print_result(str(output))
    log.info(f"to score it: {shlex.join(['ftlib', 'evaluate', 'CONFIG', f'model.base={output}', '--before'])}")
    return 0
