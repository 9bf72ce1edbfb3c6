"""What is drawn where: outlines, masks, labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from ftlib.data.location_tokens import LocatedObject, format_objects
from ftlib.data.visualize import COLOURS, SMALLEST_SIDE, draw_boxes_and_masks

BOX = (0.25, 0.5, 0.75, 1.0)
FIRST, SECOND = (ImageColor.getrgb(colour) for colour in COLOURS[:2])


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (100, 100, 100))


def where(picture: Image.Image, colour: tuple[int, ...]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(axis=-1)


def test_the_outline_lies_on_the_box() -> None:
    image = grey(400, 800)
    picture = draw_boxes_and_masks(image, format_objects([LocatedObject(BOX, "")]))
    rows, columns = np.nonzero(where(picture, FIRST))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (100, 400, 300, 800)
    assert not where(picture, FIRST)[410:790, 110:290].any(), "an outline, not a patch"
    assert where(image, (100, 100, 100)).all(), "the image itself is left as it was"


def test_objects_differ_in_colour_and_carry_their_labels() -> None:
    objects = [LocatedObject((0.1, 0.4, 0.4, 0.9), "cat"), LocatedObject((0.6, 0.4, 0.9, 0.9), "dog")]
    bare = draw_boxes_and_masks(grey(400, 400), format_objects([LocatedObject(one.box, "") for one in objects]))
    picture = draw_boxes_and_masks(grey(400, 400), format_objects(objects))
    changed = (np.asarray(picture) != np.asarray(bare)).any(axis=-1)
    assert changed[130:160, 40:60].any() and changed[130:160, 240:260].any()
    assert not changed[170:].any(), "labels stand above their boxes"
    assert where(picture, SECOND)[:, 200:].any() and not where(picture, SECOND)[:, :200].any()


@pytest.mark.parametrize("label", ["猫", "a very long label of a small box at the edge," * 3])
def test_any_label_can_be_drawn_anywhere(label: str) -> None:
    for box in ((0.0, 0.0, 0.01, 0.01), (0.99, 0.99, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)):
        assert where(draw_boxes_and_masks(grey(330, 330), format_objects([LocatedObject(box, label)])), FIRST).any()


def test_masks_are_tinted() -> None:
    mask = np.zeros((400, 400), dtype=bool)
    mask[250:300, 150:200] = True
    asked = []

    def masks(objects: list[LocatedObject], width: int, height: int) -> list[np.ndarray | None]:
        asked.append((len(objects), width, height))
        return [None, mask]

    picture = draw_boxes_and_masks(
        grey(400, 400), format_objects([LocatedObject(BOX, ""), LocatedObject(BOX, "")]), masks
    )
    assert asked == [(2, 400, 400)]
    tinted = tuple(round(0.55 * 100 + 0.45 * channel) for channel in SECOND)
    assert (where(picture, tinted) == mask).all()


def test_small_pictures_are_enlarged() -> None:
    picture = draw_boxes_and_masks(grey(64, 100), format_objects([LocatedObject(BOX, "")]))
    assert picture.size == (320, 500) and min(picture.size) >= SMALLEST_SIDE
    rows, columns = np.nonzero(where(picture, FIRST))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (80, 250, 240, 500)


@pytest.mark.parametrize("text", ["", "a cat", "<loc0001><loc0001>"])
def test_an_answer_without_objects_leaves_the_picture(text: str) -> None:
    assert where(draw_boxes_and_masks(grey(400, 400), text), (100, 100, 100)).all()
