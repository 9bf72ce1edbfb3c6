"""Boxes and masks over a picture: what was answered in full lines, what was expected in dashed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftlib.data.loc_tokens import Box, parse
from ftlib.reporting.html import Node, tag

_GRID = 128
"""Run lengths are drawn on at most so many columns and rows."""


def overlay(row: dict[str, Any]) -> Node | None:
    """What a line of predictions.jsonl locates, to be laid over its picture; None if it locates nothing."""
    shapes = [*_masks(row), *_boxes(row)]
    if not shapes:
        return None
    return tag("svg", *shapes, viewBox="0 0 1 1", preserveAspectRatio="none", class_="overlay", aria_hidden="true")


def in_words(text: str) -> str | None:
    """The labels that an answer locates; None for an answer without location tokens."""
    objects = parse(text).objects
    return ", ".join(one.label or "(no label)" for one in objects) if objects else None


def _boxes(row: dict[str, Any]) -> Iterator[Node]:
    """A row of its own reference box each; `objects` hold a detection's."""
    for reference in row["references"]:
        yield from (_rectangle(one.box, one.label, "expected") for one in parse(reference).objects)
    yield from (_rectangle(one.box, one.label, "answered") for one in parse(row["prediction"]).objects)


def _rectangle(box: Box, label: str, kind: str) -> Node:
    left, top, right, bottom = box
    place = {"x": f"{left:.4f}", "y": f"{top:.4f}", "width": f"{right - left:.4f}", "height": f"{bottom - top:.4f}"}
    return tag("rect", tag("title", f"{kind}: {label}"), class_=kind, **place)


def _masks(row: dict[str, Any]) -> Iterator[Node]:
    for mask, kind in (((row.get("facts") or {}).get("mask"), "expected"), (row.get("mask"), "answered")):
        if isinstance(mask, dict) and (path := _path(mask)):
            yield tag("path", d=path, class_=f"mask {kind}")


def _path(mask: dict[str, Any]) -> str:
    """A mask as predictions.jsonl has it (data/official/segmentation.py) as an SVG path over the unit square."""
    height, width = mask["size"]
    if "polygons" in mask:
        return " ".join(_polygon(points, height, width) for points in mask["polygons"])
    return _columns(mask["counts"], height, width)


def _polygon(points: list[float], height: int, width: int) -> str:
    places = [f"{x / width:.4f},{y / height:.4f}" for x, y in zip(points[::2], points[1::2], strict=True)]
    return f"M{' '.join(places)}Z"


def _columns(counts: str | list[int], height: int, width: int) -> str:
    """Run lengths, thinned to a grid, as upright strips."""
    import numpy as np

    from ftlib.metrics.masks import run_lengths

    runs = run_lengths(counts.encode()) if isinstance(counts, str) else np.array(counts)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)
    columns, rows = min(width, _GRID), min(height, _GRID)
    sampled = inside[np.arange(columns) * width // columns][:, np.arange(rows) * height // rows]
    edges = np.diff(np.pad(sampled, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    strip = f"h{1 / columns:.4f}"
    return "".join(
        f"M{column / columns:.4f},{top / rows:.4f}{strip}V{bottom / rows:.4f}h-{1 / columns:.4f}Z"
        for (column, top), (_, bottom) in zip(starts, ends, strict=True)
    )
