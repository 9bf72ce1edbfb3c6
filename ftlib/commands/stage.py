"""Bring what a config needs into the shared store: model and processor, and a dataset that ftlib can make.

Run it on the login node; jobs then work offline. Embedded models (ftlib/…) are made instead of downloaded.
"""

from __future__ import annotations

from pathlib import Path

from ftlib import command_line, console, files, hub
from ftlib.config import Config
from ftlib.config_data import Data
from ftlib.site import Site, find_site


def main(argv: list[str]) -> int:
    """`ftlib stage CONFIG [KEY=VALUE…]`"""
    command = command_line.parser("stage", __doc__)
    command_line.add_config(command)
    parsed = command.parse_args(argv)
    site = find_site()
    config = command_line.load(parsed, site).config
    for part in config.data.datasets.values():  # first: with a model, the hub is switched off
        console.say(f"dataset {part.source}: {_stage_data(part)}")
    console.say(f"model {config.model.base}: {_stage_model(config, site)}")
    return 0


def _stage_model(config: Config, site: Site) -> Path:
    if hub.looks_local(config.model.base) and not hub.is_embedded(config.model):
        return hub.find_model(config.model, site)  # nothing to bring
    if not hub.is_embedded(config.model):
        return hub.stage_hub_model(config.model, site)
    folder = hub.embedded_folder(config.model, site)
    if not files.is_complete(folder):
        from ftlib.models.tiny import make_embedded

        with files.publish_folder(folder) as temporary:
            make_embedded(config.model.base, temporary)
    return folder


def _stage_data(data: Data) -> Path:
    from ftlib.data.loaders import hub as hub_datasets
    from ftlib.data.sources import MAKERS

    if data.source == "hub":
        hub_datasets.fetch(data)
    root = Path(data.root)
    if data.source in MAKERS and not files.is_complete(root):
        with files.publish_folder(root) as temporary:
            MAKERS[data.source](temporary)
    return root
