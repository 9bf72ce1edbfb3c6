"""Statistics of a merge by layer: kept share of each update, cosine similarities, sign conflicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftlib.core import log
from ftlib.merging.checkpoint_io import table_row_of
from ftlib.merging.recipe import MERGED, model_letter

TensorStatistics = dict[str, Any]


class StatisticsAccumulator:
    """Sums over the blocks of one weight.

    `squares` and `dots` are sums over the whole updates, `nonzero` and `conflicts` over their kept entries. A conflict
    is an entry in which two kept updates have opposite signs.
    """

    def __init__(self, models: int) -> None:
        self._pairs = list(itertools.combinations(range(models), 2))
        self._nonzero, self._squares = [0] * models, [0.0] * models
        self._dots = [0.0] * len(self._pairs)
        self._conflicts = 0

    def add(self, updates: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Add a block."""
        flat = [update.flatten() for update in updates]
        for number, update in enumerate(flat):
            self._nonzero[number] += int(kept[number].count_nonzero())
            self._squares[number] += float(torch.dot(update, update))
        for number, (one, other) in enumerate(self._pairs):
            self._dots[number] += float(torch.dot(flat[one], flat[other]))
        if self._pairs:
            self._conflicts += _conflicts(kept)

    def to_json(self, name: str, source: str | int, elements: int) -> TensorStatistics:
        """Return the sums as JSON."""
        return {
            "name": name,
            "source": source if isinstance(source, str) else model_letter(source),
            "elements": elements,
            "nonzero": self._nonzero,
            "squares": self._squares,
            "dots": self._dots,
            "conflicts": self._conflicts,
        }


def _conflicts(kept: Sequence[Tensor]) -> int:
    low, high = kept[0], kept[0]
    for update in kept[1:]:
        low, high = torch.minimum(low, update), torch.maximum(high, update)
    return int(((low < 0) & (high > 0)).count_nonzero())


def by_layer(records: Iterable[TensorStatistics]) -> list[TensorStatistics]:
    """Return elements per layer and part, and for merged weights the kept fraction, cosines and share of conflicts."""
    groups: dict[str, list[TensorStatistics]] = {}
    for record in records:
        groups.setdefault(table_row_of(record["name"]), []).append(record)
    return [_summary(group, members) for group, members in groups.items()]


def _summary(group: str, members: Sequence[TensorStatistics]) -> TensorStatistics:
    merged = [member for member in members if member["source"] == MERGED]
    total = {"group": group, "elements": sum(member["elements"] for member in members)}
    total["sources"] = sorted({member["source"] for member in members})
    if not merged:
        return total
    elements = sum(member["elements"] for member in merged)
    nonzero, squares, dots = (_sums(merged, field) for field in ("nonzero", "squares", "dots"))
    pairs = itertools.combinations([math.sqrt(square) for square in squares], 2)
    total["nonzero"] = [count / elements for count in nonzero]
    total["norm"] = [math.sqrt(square) for square in squares]
    total["cosine"] = [
        dot / (one * other) if one and other else None for dot, (one, other) in zip(dots, pairs, strict=True)
    ]
    total["conflicts"] = sum(member["conflicts"] for member in merged) / elements
    return total


def _sums(members: Sequence[TensorStatistics], field: str) -> list[float]:
    return [sum(values) for values in zip(*(member[field] for member in members), strict=True)]


def table(layers: Sequence[TensorStatistics], models: int) -> str:
    """Return the layers as a text table."""
    names = [model_letter(number) for number in range(models)]
    pairs = [f"cos {one}{other}" for one, other in itertools.combinations(names, 2)]
    headers = ["layer", "weights", "from", *(f"kept {name}" for name in names), *pairs, "conflicts"]
    return log.format_table(headers, [_row(layer, len(headers)) for layer in layers])


def _row(layer: TensorStatistics, width: int) -> list[str]:
    start = [layer["group"], f"{layer['elements']:,}", ", ".join(layer["sources"])]
    if "nonzero" not in layer:
        return [*start, *[""] * (width - len(start))]
    cosines = ["–" if cosine is None else f"{cosine:.3f}" for cosine in layer["cosine"]]
    return [*start, *(f"{kept:.1%}" for kept in layer["nonzero"]), *cosines, f"{layer['conflicts']:.1%}"]
