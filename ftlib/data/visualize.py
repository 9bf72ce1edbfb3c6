"""Draw a model's predicted boxes, masks and labels into the image.

draw(open_image(path), text).save("answer.png")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlib.data.json_boxes import parse_answer
from ftlib.data.location_tokens import MAX_LOCATION, LocatedObject, parse_objects, to_pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#aa6e28", "#f032e6")
"""Colours of the objects, in turn; chosen for colour-blind readers."""

SMALLEST_SIDE = 320
"""Smaller images are first enlarged by an integer factor, so that lines and labels do not hide them."""

NEAREST = 0
"""Pillow's number of nearest-neighbour resampling."""

_OPACITY = 0.45

MaskFunction = Callable[[Sequence[LocatedObject], int, int], Sequence[NDArray[np.bool_] | None]]


def draw_boxes_and_masks(
    image: Image,
    text: str,
    masks: MaskFunction | None = None,
    divisor: int = MAX_LOCATION,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Image:
    """Return a copy of an image with the objects of an answer; invalid objects are not drawn.

    A label with non-ASCII characters, which the built-in font may lack, is replaced by the object's number: #1, #2.

    Args:
        image: RGB.
        text: with `<loc>` tokens, and `<seg>` tokens if there are masks.
        masks: (objects, width, height) → each object's mask, shape (height, width), or None: `MaskCodec.masks`.
            Without it, only boxes are drawn.
        facts: of the row, if its boxes have another form (`data.json_boxes`).
    """
    objects = (parse_answer(text, facts) if facts else parse_objects(text, divisor)).objects
    factor = max(1, -(-SMALLEST_SIDE // min(image.size)))
    picture = _fill_masks(image, objects, masks).resize((image.width * factor, image.height * factor), NEAREST)
    return _outline_boxes(picture, objects)


def _fill_masks(image: Image, objects: Sequence[LocatedObject], masks: MaskFunction | None) -> Image:
    """Return the image with every mask in its object's colour."""
    from PIL import Image, ImageColor

    if masks is None:
        return image.copy()
    pixels = np.asarray(image, dtype=np.float32).copy()
    for number, mask in enumerate(masks(objects, image.width, image.height)):
        if mask is not None:
            colour = np.array(ImageColor.getrgb(_colour(number)), dtype=np.float32)
            pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _outline_boxes(picture: Image, objects: Sequence[LocatedObject]) -> Image:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    thickness = max(2, min(picture.size) // 200)
    for number, one in enumerate(objects):
        left, top, right, bottom = map(round, to_pixels(one.box, picture.width, picture.height))
        place = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(place, outline=_colour(number), width=thickness)
    for number, one in enumerate(objects):  # labels above all boxes
        _label(pen, picture, one, number)
    return picture


def _label(pen: ImageDraw, picture: Image, one: LocatedObject, number: int) -> None:
    from PIL import ImageFont

    text = one.label if one.label.isascii() else f"#{number + 1}"
    if not text:
        return
    font = ImageFont.load_default(size=max(12, min(picture.size) // 32))
    left, top, *_ = to_pixels(one.box, picture.width, picture.height)
    *_, width, height = pen.textbbox((0, 0), text, font=font)
    x = max(0, min(round(left), picture.width - round(width) - 4))
    y = round(top) - round(height) - 4
    y = y if y >= 0 else round(top)
    pen.rectangle((x, y, x + width + 4, y + height + 4), fill=_colour(number))
    pen.text((x + 2, y + 1), text, fill="white", font=font)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
