"""Put a run's adapter or model on the hub, with a card; from the login node, after `hf auth login`.

The repository is private unless --public is said.
"""

from __future__ import annotations

from ftlib import command_line, pushing, runs
from ftlib.config_file import load_experiment
from ftlib.errors import UserError
from ftlib.reporting.card import write_card
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib push RUN [--to OWNER/NAME] [--public]`"""
    command = command_line.parser("push", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command.add_argument("--to", metavar="OWNER/NAME", help="the repository; default: the run's name, under your own")
    command.add_argument("--public", action="store_true", help="a new repository can be seen by everybody")
    parsed = command.parse_args(argv)
    site = find_site()
    run = runs.find_run(parsed.run, site)
    if not run.done.exists():
        raise UserError(f"{run.folder}: not trained yet", "Run `ftlib train` first.")
    config = load_experiment(run.config_file, [], site).config
    write_card(run, config)
    message = f"ftlib run {runs.handle(run, site)}"
    print(pushing.push(run.result(config.adapter.method), parsed.to or config.name, not parsed.public, message))
    return 0
