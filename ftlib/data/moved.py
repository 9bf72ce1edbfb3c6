"""The run of a config, also if its data lie elsewhere now: moved, copied, or at another path on another machine.

The path of a root outside the store is part of a run's ID. If a config has no run, a run of the same name that differs
only in such paths, and that recorded the same data, is used as the config's run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftlib.config import yaml12
from ftlib.config.loader import Experiment, Overrides, load_experiment
from ftlib.config.schema import Data
from ftlib.core import log
from ftlib.core.paths import Site
from ftlib.data.dataset import same_data
from ftlib.errors import UserError
from ftlib.runs.run import Run, find_run, run_for, update_run


def find_experiment(target: str | Mapping[str, Any], overrides: Overrides, site: Site) -> tuple[Experiment, Run]:
    """A run with its config. The run of a config may not exist yet.

    Args:
        target: a config (a .yaml or .yml file, or its content), which names the run that it would train; or a run's
            folder or name.
        overrides: of a run, only fields of `evaluation`.

    Raises:
        UserError: no such config or run, a fault in the config, or another override of a run.
    """
    if isinstance(target, Mapping) or target.endswith((".yaml", ".yml")):
        config = target if isinstance(target, Mapping) else Path(target)
        [experiment] = match_existing_runs([load_experiment(config, overrides, site)], site)
        return experiment, update_run(experiment, site)
    run = find_run(target, site, prefer_trained=True)
    if others := [text for text in overrides if not text.startswith("evaluation.")]:
        raise UserError(f"{others[0]}: of a run, only evaluation.… can be set", "Use its config instead of its name.")
    return load_experiment(run.config_file, overrides, site), run


def match_existing_runs(experiments: Sequence[Experiment], site: Site) -> list[Experiment]:
    """Replace experiments by existing runs that started with the same data at another path.

    Only saved configs are read unless there is such a run; then the data are compared, once per path. Data of a
    plugin's source are not compared, because that would run the plugin on a login node.
    """
    compared: dict[tuple[str, str], bool] = {}
    found, told = [], []
    for experiment in experiments:
        known = _match_existing_run(experiment, site, compared)
        if known is not experiment:
            locations = ", ".join(dict.fromkeys(known.data_locations.values()))
            told.append(f"{experiment.config.name}: the same data is now at {locations}; resuming the existing run")
        found.append(known)
    for line in dict.fromkeys(told):
        log.warning(line)
    return found


def _match_existing_run(experiment: Experiment, site: Site, compared: dict[tuple[str, str], bool]) -> Experiment:
    folder = site.runs / experiment.config.name
    if experiment.config.data.source_plugins or not folder.is_dir() or run_for(experiment, site).config_file.is_file():
        return experiment
    own = experiment.stored_data.locations
    # of two runs with the same data, prefer the finished one
    saved = sorted(folder.glob("*/config.yaml"), key=lambda path: (not Run(path.parent).done_marker.exists(), path))
    for locations in dict.fromkeys(map(_saved_locations, saved)):
        if not _outside(own, dict(locations)):
            continue
        other = experiment.with_data_at(dict(locations))
        run = run_for(other, site)
        if run.config_file.is_file() and _same(run, experiment, site, compared):
            return other
    return experiment


def _outside(own: dict[str, str], locations: dict[str, str]) -> bool:
    """Whether the data paths differ, and only outside the store: names and paths in the store identify the data.

    Data that were moved into the store, or out of it, count too.
    """
    if own.keys() != locations.keys():
        return False
    pairs = [(own[key], locations[key]) for key in own if own[key] != locations[key]]
    return bool(pairs) and all("/" in (one[:1], other[:1]) for one, other in pairs)


def _same(run: Run, experiment: Experiment, site: Site, compared: dict[tuple[str, str], bool]) -> bool:
    if not run.data.exists():
        return False
    key = (run.data.read_text(encoding="utf-8"), experiment.config.data.model_dump_json())
    if key not in compared:
        try:
            compared[key] = same_data(run, experiment.config, site)
        except UserError:  # the data are not there yet
            compared[key] = False
    return compared[key]


@functools.cache  # a run's config never changes
def _saved_locations(config_file: Path) -> tuple[tuple[str, str], ...]:
    """Return the data paths of a run's config; empty if it cannot be read."""
    try:
        text = config_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ()
    sections = _DATA_SECTION.findall(text)
    found = _locations_in(sections[0]) if len(sections) == 1 and text.endswith("\n") else None
    return found or _locations_in(text) or ()


_DATA_SECTION = re.compile(r"""^data:\n(?:(?: .*)?\n)*(?=[a-z'"]|\Z)""", re.MULTILINE)
"""In a config as ftlib saves it, up to the next key. Reading it alone, and once for all seeds and settings of a sweep,
makes hundreds of runs of a name cheap: a whole config takes 3 to 10 ms."""


@functools.cache
def _locations_in(document: str) -> tuple[tuple[str, str], ...] | None:
    try:
        fields, _ = yaml12.load(document, "")
        return tuple(Data.model_validate(fields["data"]).locations.items())
    except (UserError, ValidationError, LookupError, TypeError):
        return None
