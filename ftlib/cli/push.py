"""Upload a run's adapter or model, or a merge, to the hub, with a model card; on the login node, after `hf auth login`.

Lists the files and asks for confirmation, unless --yes. The repository is private unless --public.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ftlib.cli import arguments
from ftlib.config.loader import load_experiment
from ftlib.core import log
from ftlib.core.paths import Site, find_site
from ftlib.hub import upload
from ftlib.hub.cache import MERGE_RECORD
from ftlib.runs import run as runs
from ftlib.runs.model_card import write_card


def main(argv: list[str]) -> int:
    """`ftlib push RUN [--to OWNER/NAME] [--public] [--yes]`"""
    command = arguments.make_parser("push", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name, or the folder of a merge")
    command.add_argument("--to", metavar="OWNER/NAME", help="the repository; default: the run's name, under your own")
    command.add_argument("--public", action="store_true", help="a new repository can be seen by everybody")
    command.add_argument("--yes", action="store_true", help="do not ask")
    parsed = command.parse_args(argv)
    site = find_site()
    if (merged := Path(parsed.run) / MERGE_RECORD).is_file():
        return _push_merged(merged.parent.absolute(), parsed, site)
    run = runs.find_trained_run(parsed.run, site)
    config = load_experiment(run.config_file, [], site).config
    write_card(run, config)
    sent, name = (
        upload.files_to_upload(run.result_folder(config.adapter.method), config, site),
        parsed.to or config.name,
    )
    if upload.confirm(sent, config, name, not parsed.public, parsed.yes):
        log.print_result(upload.push(sent, name, not parsed.public, f"ftlib run {runs.run_name(run, site)}"))
    return 0


def _push_merged(folder: Path, parsed: argparse.Namespace, site: Site) -> int:
    """Upload a result of `ftlib merge`, which already has a model card."""
    sent, name = upload.files_to_upload(folder, None, site), parsed.to or folder.name
    if upload.confirm(sent, None, name, not parsed.public, parsed.yes):
        log.print_result(upload.push(sent, name, not parsed.public, f"ftlib merge {folder.name}"))
    return 0
