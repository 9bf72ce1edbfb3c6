"""One weight's way through a method: passes over its updates first where the method needs them, then block by block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import torch
from torch import Tensor

from ftlib import console
from ftlib.merging import methods, threads
from ftlib.merging.deltas import Tuned
from ftlib.merging.plan import Weight
from ftlib.merging.recipe import MERGED, Recipe

BLOCK = 1 << 18
"""Entries that are looked at together: few enough to stay in a core's cache."""

Sparsify = Callable[[Tensor], Tensor]


class Stopped(Exception):
    """The work was told to stop."""


@dataclass(frozen=True)
class Rows:
    """The rows of a weight, in the base and in the models."""

    weight: Weight
    models: Sequence[Tuned]
    stop: Event

    def base(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, the base's float32 rows) of every block, in order."""
        stored = self.weight.base
        step = max(1, BLOCK // max(1, stored.columns))
        for start in range(0, stored.rows, step):
            if self.stop.is_set():
                raise Stopped
            yield start, stored.read(start, min(start + step, stored.rows)).float()

    def updates(self, model: int) -> Iterator[Tensor]:
        """The blocks of one model's update."""
        for start, base in self.base():
            yield self.models[model].update(self.weight.name, start, base)


@dataclass(frozen=True)
class Work:
    """What is merged, and where its shards go.

    Attributes:
        labels: the models' names in messages.
        stop: set when the work must end early.
    """

    recipe: Recipe
    weights: Sequence[Weight]
    models: Sequence[Tuned]
    labels: Sequence[str]
    folder: Path
    stop: Event = field(default_factory=Event)

    def rows(self, weight: Weight) -> Rows:
        """The rows of one weight."""
        return Rows(weight, self.models, self.stop)


@dataclass(frozen=True)
class Overall:
    """What `trim: global` finds in a first pass over the whole model.

    Attributes:
        thresholds: for every model, the magnitude from which on entries are kept.
        tie: the sign where kept updates cancel out: that of most entries of the model.
    """

    thresholds: list[float]
    tie: int = 1

    def trims(self) -> list[Sparsify]:
        """Fresh trims for one weight."""
        return [methods.Trim(threshold, None) for threshold in self.thresholds]


class Blender:
    """A recipe for one weight."""

    def __init__(self, recipe: Recipe, rows: Rows, overall: Overall | None) -> None:
        self._recipe, self._settings = recipe, recipe.resolved
        self._tie = overall.tie if overall else 1
        self._sparsify = overall.trims() if overall else self._own_sparsify(rows)
        self._arc = _arc(rows, recipe.weights) if recipe.method == "slerp" else (0.0, 0.0)

    def _own_sparsify(self, rows: Rows) -> list[Sparsify]:
        density = self._settings.get("density", 1)
        if density == 1:
            return []
        name, numbers = rows.weight.name, range(len(rows.models))
        if self._recipe.method == "ties":
            keep = int(density * rows.weight.elements)
            return [methods.trim_to(functools.partial(rows.updates, number), keep) for number in numbers]
        return [methods.Drop(density, self._settings["seed"], number, name) for number in numbers]

    def sparsify(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is kept of the next block's updates."""
        if not self._sparsify:
            return updates
        return [sparsify(update) for sparsify, update in zip(self._sparsify, updates, strict=True)]

    def mix(self, base: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The block's result."""
        weights = self._recipe.weights
        if self._recipe.method == "slerp":
            return methods.weighted_sum([base + update for update in kept], self._arc)
        normalize, scale = self._settings.get("normalize", "weights"), self._settings.get("scale", 1.0)
        if self._recipe.method in ("ties", "dare_ties"):
            return methods.elect(kept, weights, normalize, scale, self._tie).add_(base)
        return methods.weighted_sum(kept, methods.coefficients(weights, normalize, scale)).add_(base)


def _arc(rows: Rows, weights: Sequence[float]) -> tuple[float, float]:
    dot = square_a = square_b = 0.0
    name = rows.weight.name
    for start, base in rows.base():
        a, b = (model.value(name, start, base).flatten().double() for model in rows.models)
        dot += float(torch.dot(a, b))
        square_a += float(torch.dot(a, a))
        square_b += float(torch.dot(b, b))
    return methods.slerp_coefficients(weights[1] / sum(weights), dot, math.sqrt(square_a), math.sqrt(square_b))


def find_overall(work: Work, executor: ThreadPoolExecutor) -> Overall | None:
    """The thresholds of `trim: global` as in the authors' program, and their sign for what cancels out.

    With n entries and k = ⌊density·n⌋ the threshold is the (n - k)-th smallest magnitude, so k + 1 entries are kept,
    and all that are equal to the last (github.com/prateeky2806/ties-merging, topk_values_mask and resolve_zero_signs).
    """
    density = work.recipe.resolved["density"]
    if density == 1:
        return None
    merged = [weight for weight in work.weights if weight.source == MERGED]
    total = sum(weight.elements for weight in merged)
    keep = min(total, int(density * total) + 1)
    console.say(f"looking for one threshold over {total:,} weights of each model")
    thresholds = []
    for model in range(len(work.models)):
        count = functools.partial(_count_everywhere, work, executor, merged, model)
        thresholds.append(methods.kth_magnitude(count, keep)[0])
    return Overall(thresholds, _majority(work, Overall(thresholds), merged, executor))


def _count_everywhere(
    work: Work, executor: ThreadPoolExecutor, merged: Sequence[Weight], model: int, high: int | None
) -> Tensor:
    total, lock = torch.zeros(methods.BUCKETS, dtype=torch.int64), Lock()

    def one(weight: Weight) -> None:
        counts = methods.count_blocks(work.rows(weight).updates(model), high)
        with lock:
            total.add_(counts)

    threads.run(executor, one, merged, work.stop)
    return total


def _majority(work: Work, overall: Overall, merged: Sequence[Weight], executor: ThreadPoolExecutor) -> int:
    """The sign that most elected entries have; without a majority the negative one, as in the authors' program."""

    def one(weight: Weight) -> float:
        trims, signs = overall.trims(), 0.0
        for start, base in work.rows(weight).base():
            updates = [model.update(weight.name, start, base) for model in work.models]
            kept = [trim(update) for trim, update in zip(trims, updates, strict=True)]
            signs += float(methods.weighted_sum(kept, work.recipe.weights).sign().sum())
        return signs

    return 1 if sum(threads.run(executor, one, merged, work.stop)) > 0 else -1
