"""Runs whose data lie elsewhere now: moved, copied, or mounted at another path on another machine.

A root outside the store is part of a run's identity as a path. Where a config has no run of its own, the run of the
same name that differs from it in nothing but such paths, and that noted the very same data, is the config's run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ftlib import console, yaml_core
from ftlib.config_data import Data
from ftlib.config_file import Experiment
from ftlib.data.prepared import same_data
from ftlib.errors import UserError
from ftlib.runs import Run, run_of
from ftlib.site import Site


def known_by_data(experiments: Sequence[Experiment], site: Site) -> list[Experiment]:
    """The experiments, those under the name of an existing run that were begun with the same data elsewhere.

    Nothing but saved configs is read unless there is such a run; then data are compared, once for each place.
    """
    compared: dict[tuple[str, str], bool] = {}
    found, told = [], []
    for experiment in experiments:
        known = _known(experiment, site, compared)
        if known is not experiment:
            places = ", ".join(dict.fromkeys(known.elsewhere.values()))
            told.append(f"{experiment.config.name}: the same data now at {places}; going on with the run begun before")
        found.append(known)
    for line in dict.fromkeys(told):
        console.say(line)
    return found


def _known(experiment: Experiment, site: Site, compared: dict[tuple[str, str], bool]) -> Experiment:
    folder = site.runs / experiment.config.name
    if not folder.is_dir() or run_of(experiment, site).config_file.is_file():
        return experiment
    own = experiment.stored_data.places
    # of two that were begun with the same data, the finished one
    saved = sorted(folder.glob("*/config.yaml"), key=lambda path: (not Run(path.parent).done.exists(), path))
    for places in dict.fromkeys(map(_saved_places, saved)):
        if not _outside(own, dict(places)):
            continue
        other = experiment.named_by(dict(places))
        run = run_of(other, site)
        if run.config_file.is_file() and _same(run, experiment, site, compared):
            return other
    return experiment


def _outside(own: dict[str, str], places: dict[str, str]) -> bool:
    """Whether places differ, and only in paths outside the store: below it, and in names, another one means other data.

    Data that were brought into the store, or out of it, count too.
    """
    if own.keys() != places.keys():
        return False
    pairs = [(own[key], places[key]) for key in own if own[key] != places[key]]
    return bool(pairs) and all("/" in (one[:1], other[:1]) for one, other in pairs)


def _same(run: Run, experiment: Experiment, site: Site, compared: dict[tuple[str, str], bool]) -> bool:
    if not run.data.exists():
        return False
    key = (run.data.read_text(encoding="utf-8"), experiment.config.data.model_dump_json())
    if key not in compared:
        try:
            compared[key] = same_data(run, experiment.config, site)
        except UserError:  # nothing is there yet
            compared[key] = False
    return compared[key]


@functools.cache  # a run's name stands for them
def _saved_places(config_file: Path) -> tuple[tuple[str, str], ...]:
    """Where a run's config says that its data lie; nothing if it cannot be read."""
    try:
        fields, _ = yaml_core.load(config_file.read_text(encoding="utf-8"), str(config_file))
        return tuple(Data.model_validate(fields["data"]).places.items())
    except (OSError, UserError, ValidationError, LookupError, TypeError):
        return ()
