"""Run the whole pipeline on real handwritten digits: no cluster, no downloads, about two minutes on two cores.

stage → prepare → evaluate --before → train → evaluate → report, each in a separate process, as on a cluster.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ftlib.cli import arguments as cli_arguments
from ftlib.core import log
from ftlib.core.paths import REPOSITORY, find_site
from ftlib.errors import UserError
from ftlib.run_module import module_command


def main(argv: list[str]) -> int:
    """`ftlib demo [KEY=VALUE…]`"""
    command = cli_arguments.make_parser("demo", __doc__)
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="change a field of configs/digits.yaml")
    parsed = command.parse_args(argv)
    config = _find_config()
    find_site()
    began = time.monotonic()
    arguments = [str(config), *parsed.overrides]
    for name in ("stage", "prepare", "evaluate --before", "train"):
        folder = _run([*name.split(), *arguments])
    for name in ("evaluate", "report"):
        _run([name, folder])
    log.info(f"demo finished in {time.monotonic() - began:.0f} s: {Path(folder) / 'report.html'}")
    return 0


def _find_config() -> Path:
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "configs" / "digits.yaml").is_file():
            return folder / "configs" / "digits.yaml"
    raise UserError("configs/digits.yaml does not exist here", "Run the demo in a clone of the repository.")


def _run(arguments: list[str]) -> str:
    """Run `ftlib ARGUMENTS…` and return the last line of its output; exits with its code if it fails."""
    log.info(f"\n$ ftlib {' '.join(arguments)}")
    log.export_verbosity()
    done = subprocess.run(module_command("ftlib", *arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
