"""Expand a config with `sweep` into runs; each point is validated like a separate config.

    sweep:
      seed: [0, 1, 2]                                   # every combination of the values …
      data.prompt: ["answer en {question}", "{question}"]
      list:                                             # … with each of these points …
        - {training.learning_rate: 1.0e-4, training.num_train_epochs: 3}
        - {training.learning_rate: 3.0e-4, training.num_train_epochs: 1}
      random:                                           # … and with each of these draws
        count: 20
        seed: 0
        draw: {training.weight_decay: {uniform: [0, 0.1]}, adapter.r: [4, 8, 16]}

A key may be any field by its dotted path. Draws are uniform, log_uniform, or one of a list, without duplicates;
a higher `count` keeps the earlier draws. Which of the runs are submitted is decided in submit.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftlib.config import yaml12
from ftlib.config.loader import Experiment, RawConfig, set_field, validate_experiment
from ftlib.core.paths import Site
from ftlib.data.moved import match_existing_runs
from ftlib.errors import UserError

_SHARED = ("name", "job", "sweep")
"""Keys that all runs of a sweep share."""

_MAX_RUNS = 5000
"""Maximum number of runs of a config; Slurm's default for all users is 10,000 jobs (MaxJobCount)."""

_TRIES = 100
"""Maximum draws per requested point, because duplicates are drawn again."""


@dataclass(frozen=True)
class Override:
    """A field of a point: dotted key, value, and location in the file."""

    key: str
    value: Any
    location: str


SweepPoint = tuple[Override, ...]


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        label: its differences as KEY=VALUE; empty without a sweep.
    """

    experiment: Experiment
    label: str


def expand_sweep(source: RawConfig, site: Site, environment: Mapping[str, str] = os.environ) -> list[SweepRun]:
    """Return the runs of a config; a single one without `sweep`.

    Raises:
        UserError: all errors of all runs, one per line; or duplicate points.
    """
    sweep = source.data.get("sweep")
    if sweep is None:
        return _known([SweepRun(validate_experiment(source, site, environment), "")], site)
    sweep_runs, faults = [], []
    for point in _points(source, sweep):
        try:
            sweep_runs.append(SweepRun(validate_experiment(_at_point(source, point), site, environment), _label(point)))
        except UserError as error:
            faults += error.problem.splitlines()
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    sweep_runs = _known(sweep_runs, site)
    _reject_duplicates(sweep_runs, source.location(("sweep",)))
    return sweep_runs


def _known(sweep_runs: list[SweepRun], site: Site) -> list[SweepRun]:
    experiments = match_existing_runs([member.experiment for member in sweep_runs], site)
    return [replace(member, experiment=each) for member, each in zip(sweep_runs, experiments, strict=True)]


def _at_point(source: RawConfig, point: SweepPoint) -> RawConfig:
    data = copy.deepcopy({key: value for key, value in source.data.items() if key != "sweep"})
    locations = dict(source.locations)
    for setting in point:
        set_field(data, locations, setting.key, copy.deepcopy(setting.value), setting.location)
    return RawConfig(source.path, data, locations)


def _label(point: SweepPoint) -> str:
    return " ".join(f"{setting.key}={setting.value}" for setting in point)


def _reject_duplicates(sweep_runs: list[SweepRun], location: str) -> None:
    seen: dict[str, str] = {}
    for member in sweep_runs:
        identity = member.experiment.identity
        if identity in seen:
            problem = f"{location}: sweep: duplicate points: {seen[identity]} / {member.label}"
            raise UserError(problem, "Both would train identical weights; remove one.")
        seen[identity] = member.label


def _points(source: RawConfig, sweep: Any) -> list[SweepPoint]:
    if not isinstance(sweep, dict) or not sweep:
        raise UserError(f"{source.location(('sweep',))}: sweep: must be a mapping of dotted keys to lists of values")
    rest = {key: value for key, value in sweep.items() if key not in ("list", "random")}
    axes: list[list[SweepPoint]] = [[(setting,) for setting in axis] for axis in _grid_axes(source, rest, ("sweep",))]
    if "list" in sweep:
        axes.append(_list_points(source, sweep["list"]))
    if "random" in sweep:
        axes.append(_random_points(source, sweep["random"]))
    if (runs := math.prod(map(len, axes))) > _MAX_RUNS:
        counted = " x ".join(map(str, map(len, axes)))
        problem = f"{source.location(('sweep',))}: sweep: {counted if len(axes) > 1 else runs} points: too many runs"
        raise UserError(problem, f"The maximum for one config is {_MAX_RUNS:,}.")
    points = [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*axes)]
    for point in points:
        _reject_shared(point)
    return points


def _reject_shared(point: SweepPoint) -> None:
    keys = [setting.key for setting in point]
    for setting in point:
        if setting.key.split(".")[0] in _SHARED:
            raise UserError(
                f"{setting.location}: {setting.key}: all runs of a sweep share it", "Set it outside of sweep."
            )
        if keys.count(setting.key) > 1:
            raise UserError(f"{setting.location}: sweep: {setting.key} is set twice in one point")


def _grid_axes(source: RawConfig, values: dict[str, Any], path: yaml12.KeyPath) -> Iterator[list[Override]]:
    """Yield one axis for each key; a nested section is equivalent to a dotted key."""
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict):
            yield from _grid_axes(source, value, here)
        elif isinstance(value, list) and value:
            name = ".".join(map(str, here[1:]))
            yield [Override(name, item, source.location((*here, index))) for index, item in enumerate(value)]
        else:
            raise UserError(f"{source.location(here)}: {'.'.join(map(str, here))}: must be a list of values")


def _list_points(source: RawConfig, points: Any) -> list[SweepPoint]:
    path: yaml12.KeyPath = ("sweep", "list")
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) and point for point in points):
        raise UserError(f"{source.location(path)}: sweep.list: must be a list of mappings, one for each point")
    return [
        tuple(Override(key, value, source.location((*path, index, key))) for key, value in point.items())
        for index, point in enumerate(points)
    ]


def _random_points(source: RawConfig, settings: Any) -> list[SweepPoint]:
    path: yaml12.KeyPath = ("sweep", "random")
    known = {"count", "seed", "draw"}
    if not isinstance(settings, dict) or set(settings) - known or not isinstance(settings.get("draw"), dict):
        raise UserError(f"{source.location(path)}: sweep.random: must have count and draw, and may have seed")
    count, seed = settings.get("count"), settings.get("seed", 0)
    if type(count) is not int or count < 1 or type(seed) is not int:
        raise UserError(f"{source.location(path)}: sweep.random: count (at least 1) and seed must be whole numbers")
    if count > _MAX_RUNS:
        here = source.location((*path, "count"))
        raise UserError(f"{here}: sweep.random.count: must be at most {_MAX_RUNS:,}, got {count}")
    draws = [
        (key, _sampler(rule, source.location((*path, "draw", key)), key), source.location((*path, "draw", key)))
        for key, rule in settings["draw"].items()
    ]
    generator = random.Random(seed)
    points: dict[str, SweepPoint] = {}
    for _ in range(_TRIES * count):
        point = tuple(Override(key, draw(generator.random()), place) for key, draw, place in draws)
        points.setdefault(_label(point), point)
        if len(points) == count:
            return list(points.values())
    raise UserError(f"{source.location(path)}: sweep.random: count is {count}, but draw has only {len(points)} points")


def _sampler(rule: Any, location: str, key: str) -> Callable[[float], Any]:
    """Return a function from [0, 1) to values; numbers are rounded to four digits for readability."""
    if isinstance(rule, list) and rule:
        return lambda share: rule[int(share * len(rule))]
    match rule:
        case {"uniform": [int() | float() as low, int() | float() as high]} if len(rule) == 1 and low < high:
            return lambda share: float(f"{low + share * (high - low):.4g}")
        case {"log_uniform": [int() | float() as low, int() | float() as high]} if len(rule) == 1 and 0 < low < high:
            pass
        case _:
            wanted = "a list, uniform: [low, high] or log_uniform: [low, high] with 0 < low"
            raise UserError(f"{location}: sweep.random.draw.{key}: must be {wanted}")
    return lambda share: float(f"{math.exp(math.log(low) + share * math.log(high / low)):.4g}")
