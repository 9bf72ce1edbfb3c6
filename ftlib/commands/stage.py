"""Bring what a config needs into the shared store: model and processor, a dataset of the hub or one that ftlib makes.

Run it on the login node; jobs then work offline. A hub's model or dataset stays at the commit that was first staged;
model.revision names another one. Embedded models (ftlib/…) are made instead of downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ftlib import command_line, console, files, history, hub, staging
from ftlib.config import Config
from ftlib.config_data import Data
from ftlib.data.moved import known_by_data
from ftlib.runs import run_of
from ftlib.site import Site, find_site


def main(argv: list[str]) -> int:
    """`ftlib stage CONFIG [KEY=VALUE…]`"""
    command = command_line.parser("stage", __doc__)
    command_line.add_config(command)
    parsed = command.parse_args(argv)
    site = find_site()
    [experiment] = known_by_data([command_line.load(parsed, site)], site)
    config = experiment.config
    with files.shared_with_group(), history.before_training(run_of(experiment, site), "stage"):
        for part in config.data.datasets.values():  # first: with a model, the hub is switched off
            console.say(f"dataset {part.source}: {_stage_data(part, site)}")
        own = " (a folder of your own: nothing to bring)" if hub.looks_local(config.model.base) else ""
        console.say(f"model {config.model.base}: {_stage_model(config, site)}{own}")
    return 0


def _stage_model(config: Config, site: Site) -> Path:
    """Also hashes what it holds, so that no job has to."""
    embedded = hub.is_embedded(config.model)
    folder = hub.embedded_folder(config.model, site) if embedded else staging.stage_model(config.model, site)
    if embedded and not files.is_complete(folder):
        from ftlib.models.tiny import make_embedded

        with files.publish_folder(folder) as temporary:
            make_embedded(config.model.base, temporary)
    hub.model_hashes(folder, site)
    return folder


def _stage_data(data: Data, site: Site) -> Path:
    from ftlib.data.loaders import hub as hub_datasets
    from ftlib.data.sources import MAKERS

    if data.source == "hub":
        name = data.file.partition(":")[0]
        if not hub.looks_local(name):
            staging.stage_dataset(name, site)
        if importlib.util.find_spec("datasets"):
            hub_datasets.fetch(data)
        else:
            console.say(
                "pictures inside of it are unpacked in the container: by the job, or `jobs/run.sh ftlib stage …`"
            )
    root = Path(data.root)
    if data.source in MAKERS and not files.is_complete(root):
        with files.publish_folder(root) as temporary:
            MAKERS[data.source](temporary)
    return root
