"""One config file in, its runs out: the points of `sweep`, each checked like a config of its own.

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

A key may be any field by its dotted path. Draws are uniform, log_uniform, or one of a list, and no two are the
same; raising `count` keeps the earlier ones.
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

from ftlib import yaml_core
from ftlib.config_file import Experiment, Source, check, set_field
from ftlib.data.moved import known_by_data
from ftlib.errors import UserError
from ftlib.site import Site

_SHARED = ("name", "job", "sweep")
"""What all runs of a sweep have in common."""

_TRIES = 100
"""Draws for each point that is asked for, since the same one may come again."""


@dataclass(frozen=True)
class Setting:
    """One field of one point: a dotted key, its value, and where it stands in the file."""

    key: str
    value: Any
    place: str


Point = tuple[Setting, ...]


@dataclass(frozen=True)
class Member:
    """A run of a sweep.

    Attributes:
        label: what sets it apart, as KEY=VALUE; empty without a sweep.
    """

    experiment: Experiment
    label: str


def expand(source: Source, site: Site, environment: Mapping[str, str] = os.environ) -> list[Member]:
    """The runs that a config stands for; without `sweep` one.

    Raises:
        UserError: every fault of every run, one a line; or two points that are the same run.
    """
    sweep = source.data.get("sweep")
    if sweep is None:
        return _known([Member(check(source, site, environment), "")], site)
    members, faults = [], []
    for point in _points(source, sweep):
        try:
            members.append(Member(check(_at(source, point), site, environment), _label(point)))
        except UserError as error:
            faults += error.problem.splitlines()
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    members = _known(members, site)
    _refuse_twins(members, source.place(("sweep",)))
    return members


def _known(members: list[Member], site: Site) -> list[Member]:
    experiments = known_by_data([member.experiment for member in members], site)
    return [replace(member, experiment=each) for member, each in zip(members, experiments, strict=True)]


def _at(source: Source, point: Point) -> Source:
    data = copy.deepcopy({key: value for key, value in source.data.items() if key != "sweep"})
    places = dict(source.places)
    for setting in point:
        set_field(data, places, setting.key, copy.deepcopy(setting.value), setting.place)
    return Source(source.path, data, places)


def _label(point: Point) -> str:
    return " ".join(f"{setting.key}={setting.value}" for setting in point)


def _refuse_twins(members: list[Member], place: str) -> None:
    seen: dict[str, str] = {}
    for member in members:
        identity = member.experiment.identity
        if identity in seen:
            problem = f"{place}: sweep: these are the same run: {seen[identity]} / {member.label}"
            raise UserError(problem, "They differ in nothing that changes the trained weights; leave one out.")
        seen[identity] = member.label


def _points(source: Source, sweep: Any) -> list[Point]:
    if not isinstance(sweep, dict) or not sweep:
        raise UserError(f"{source.place(('sweep',))}: sweep: must be a mapping of dotted keys to lists of values")
    rest = {key: value for key, value in sweep.items() if key not in ("list", "random")}
    axes: list[list[Point]] = [[(setting,) for setting in axis] for axis in _grid(source, rest, ("sweep",))]
    if "list" in sweep:
        axes.append(_listed(source, sweep["list"]))
    if "random" in sweep:
        axes.append(_drawn(source, sweep["random"]))
    points = [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*axes)]
    for point in points:
        _refuse_shared(point)
    return points


def _refuse_shared(point: Point) -> None:
    keys = [setting.key for setting in point]
    for setting in point:
        if setting.key.split(".")[0] in _SHARED:
            raise UserError(f"{setting.place}: {setting.key}: all runs of a sweep share it", "Set it outside of sweep.")
        if keys.count(setting.key) > 1:
            raise UserError(f"{setting.place}: sweep: {setting.key} is set twice in one point")


def _grid(source: Source, values: dict[str, Any], path: yaml_core.Path) -> Iterator[list[Setting]]:
    """One axis for each key; a nested section is the same as a dotted key."""
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict):
            yield from _grid(source, value, here)
        elif isinstance(value, list) and value:
            name = ".".join(map(str, here[1:]))
            yield [Setting(name, item, source.place((*here, index))) for index, item in enumerate(value)]
        else:
            raise UserError(f"{source.place(here)}: {'.'.join(map(str, here))}: must be a list of values")


def _listed(source: Source, points: Any) -> list[Point]:
    path: yaml_core.Path = ("sweep", "list")
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) and point for point in points):
        raise UserError(f"{source.place(path)}: sweep.list: must be a list of mappings, one for each point")
    return [
        tuple(Setting(key, value, source.place((*path, index, key))) for key, value in point.items())
        for index, point in enumerate(points)
    ]


def _drawn(source: Source, settings: Any) -> list[Point]:
    path: yaml_core.Path = ("sweep", "random")
    known = {"count", "seed", "draw"}
    if not isinstance(settings, dict) or set(settings) - known or not isinstance(settings.get("draw"), dict):
        raise UserError(f"{source.place(path)}: sweep.random: must have count and draw, and may have seed")
    count, seed = settings.get("count"), settings.get("seed", 0)
    if type(count) is not int or count < 1 or type(seed) is not int:
        raise UserError(f"{source.place(path)}: sweep.random: count (at least 1) and seed must be whole numbers")
    draws = [
        (key, _drawing(rule, source.place((*path, "draw", key)), key), source.place((*path, "draw", key)))
        for key, rule in settings["draw"].items()
    ]
    generator = random.Random(seed)
    points: dict[str, Point] = {}
    for _ in range(_TRIES * count):
        point = tuple(Setting(key, draw(generator.random()), place) for key, draw, place in draws)
        points.setdefault(_label(point), point)
        if len(points) == count:
            return list(points.values())
    raise UserError(f"{source.place(path)}: sweep.random: count is {count}, but draw has only {len(points)} points")


def _drawing(rule: Any, place: str, key: str) -> Callable[[float], Any]:
    """What turns a number between 0 and 1 into a value; numbers get four digits, so that they can be read and typed."""
    if isinstance(rule, list) and rule:
        return lambda share: rule[int(share * len(rule))]
    match rule:
        case {"uniform": [int() | float() as low, int() | float() as high]} if len(rule) == 1 and low < high:
            return lambda share: float(f"{low + share * (high - low):.4g}")
        case {"log_uniform": [int() | float() as low, int() | float() as high]} if len(rule) == 1 and 0 < low < high:
            pass
        case _:
            wanted = "a list, uniform: [low, high] or log_uniform: [low, high] with 0 < low"
            raise UserError(f"{place}: sweep.random.draw.{key}: must be {wanted}")
    return lambda share: float(f"{math.exp(math.log(low) + share * math.log(high / low)):.4g}")
