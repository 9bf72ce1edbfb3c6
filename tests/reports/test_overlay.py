"""Boxes and masks over pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ftlib.data.location_tokens import LocatedObject, format_objects
from ftlib.reports.gallery import located_labels, overlay
from ftlib.runs.run import Run
from tests.reports.fake_runs import evaluate, row, train


def _row(prediction: str, expected: str, **more: Any) -> dict[str, Any]:
    return row(1, prediction, expected, **more)


def test_boxes_stand_where_the_tokens_say() -> None:
    answered = format_objects([LocatedObject((0.5, 0.25, 1.0, 0.75), "cat")])
    expected = format_objects([LocatedObject((0.0, 0.0, 0.5, 1.0), "cat")])
    shapes = [
        (shape["kind"], *(round(float(shape[name]), 2) for name in ("x", "y", "width", "height")))
        for shape in overlay(_row(answered, expected))
    ]
    assert shapes == [("expected", 0, 0, 0.5, 1), ("answered", 0.5, 0.25, 0.5, 0.5)]


def test_answers_without_places_have_no_overlay() -> None:
    assert overlay(_row("yes", "no")) == []
    assert located_labels("yes") is None
    assert (
        located_labels(format_objects([LocatedObject((0, 0, 1, 1), "cat"), LocatedObject((0, 0, 0.5, 1), "")]))
        == "cat, (no label)"
    )


def test_run_lengths_are_drawn_where_the_mask_is() -> None:
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:30, 15:45] = 1
    pixels[20:25, 20:25] = 0
    encoded = coco.encode(np.asfortranarray(pixels))
    mask = {"size": [40, 60], "counts": encoded["counts"].decode()}
    (shape,) = overlay(_row("no box", "none", mask=mask))
    assert shape["kind"] == "answered"
    drawn = np.zeros((40, 60), dtype=np.uint8)
    for left, top, width, bottom in re.findall(r"M([\d.]+),([\d.]+)h([\d.]+)V([\d.]+)h-", shape["path"]):
        column = round(float(left) * 60)
        assert round(float(width) * 60) == 1
        drawn[round(float(top) * 40) : round(float(bottom) * 40), column] = 1
    assert (drawn == pixels).all()


def test_an_expected_polygon() -> None:
    mask = {"size": [100, 200], "polygons": [[0, 0, 100, 0, 100, 50]]}
    shapes = overlay(_row("no box", "none", facts={"mask": mask}))
    assert shapes == [{"kind": "expected", "path": "M0.0000,0.0000 0.5000,0.0000 0.5000,0.5000Z"}]


def test_cards_show_boxes_and_words(run: Run, page: Callable[[Run], str]) -> None:
    answered = "<loc0001><loc0002><loc0900><loc0800> cat"
    train(run)
    evaluate(run, "valid", "after", [row(1, answered, "<loc0001><loc0002><loc0900><loc0700> dog")])
    text = page(run)
    assert '<rect class="answered"' in text
    assert "<strong>cat</strong>" in text
    assert "Solid lines: answer. Dashed lines: expected." in text
