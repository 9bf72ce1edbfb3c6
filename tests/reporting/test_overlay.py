"""Boxes and masks over pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ftlib.data.loc_tokens import Located, to_text
from ftlib.reporting.overlay import in_words, overlay
from ftlib.runs import Run
from tests.reporting.fake_runs import evaluate, row, train

Rectangle = tuple[str, float, float, float, float]


def _rectangles(markup: str) -> list[Rectangle]:
    found = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', markup)
    return [(kind, *(float(number) for number in numbers)) for kind, *numbers in found]


def _row(prediction: str, expected: str, **more: Any) -> dict[str, Any]:
    return row(1, prediction, expected, **more)


def test_boxes_stand_where_the_tokens_say() -> None:
    answered = to_text([Located((0.5, 0.25, 1.0, 0.75), "cat")])
    expected = to_text([Located((0.0, 0.0, 0.5, 1.0), "cat")])
    found = overlay(_row(answered, expected))
    assert found
    assert [(kind, *(round(x, 2) for x in place)) for kind, *place in _rectangles(found.markup)] == [
        ("expected", 0, 0, 0.5, 1),
        ("answered", 0.5, 0.25, 0.5, 0.5),
    ]


def test_answers_without_places_have_no_overlay() -> None:
    assert overlay(_row("yes", "no")) is None
    assert in_words("yes") is None
    assert in_words(to_text([Located((0, 0, 1, 1), "cat"), Located((0, 0, 0.5, 1), "")])) == "cat, (no label)"


def test_run_lengths_are_drawn_where_the_mask_is() -> None:
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:30, 15:45] = 1
    pixels[20:25, 20:25] = 0
    encoded = coco.encode(np.asfortranarray(pixels))
    mask = {"size": [40, 60], "counts": encoded["counts"].decode()}
    found = overlay(_row("no box", "none", mask=mask))
    assert found and 'class="mask answered"' in found.markup
    drawn = np.zeros((40, 60), dtype=np.uint8)
    for left, top, width, bottom in re.findall(r"M([\d.]+),([\d.]+)h([\d.]+)V([\d.]+)h-", found.markup):
        column = round(float(left) * 60)
        assert round(float(width) * 60) == 1
        drawn[round(float(top) * 40) : round(float(bottom) * 40), column] = 1
    assert (drawn == pixels).all()


def test_an_expected_polygon() -> None:
    mask = {"size": [100, 200], "polygons": [[0, 0, 100, 0, 100, 50]]}
    found = overlay(_row("no box", "none", facts={"mask": mask}))
    assert found and 'd="M0.0000,0.0000 0.5000,0.0000 0.5000,0.5000Z" class="mask expected"' in found.markup


def test_cards_show_boxes_and_words(run: Run, page: Callable[[Run], str]) -> None:
    answered = "<loc0001><loc0002><loc0900><loc0800> cat"
    train(run)
    evaluate(run, "valid", "after", [row(1, answered, "<loc0001><loc0002><loc0900><loc0700> dog")])
    text = page(run)
    assert '<rect class="answered"' in text
    assert "<strong>cat</strong>" in text
    assert "Full lines: answered. Dashed lines: expected." in text
