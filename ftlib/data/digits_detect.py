"""Real handwritten digits, several on a canvas, with the box of each: detection end to end without a download.

The digits are those of `digits.py`. They are divided into train, valid and test first, and each part's canvases are
made of its own digits alone: no handwriting that is asked was ever learned. A box is as tight as the digit's ink.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftlib.data.digits import real_digits
from ftlib.data.examples import write_records
from ftlib.data.loc_tokens import Located, to_fractions, to_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CANVAS = 48
"""Width and height in pixels."""

MAX_DIGITS = 3
SCALE = 2
"""How many pixels wide a pixel of a digit becomes; digits have 8 × 8."""

SIDE = 8 * SCALE
GRID = 8
"""Digits begin at multiples of this, so that few coordinates have to be learned."""

ROWS: dict[Literal["train", "valid", "test"], int] = {"train": 8000, "valid": 400, "test": 400}
SHARES = {"train": 0.7, "valid": 0.15, "test": 0.15}
"""Of the 1,797 digits."""

PREFIX = "detect digits"
_TRIES = 50

Digit = tuple["NDArray[np.uint8]", str]
PixelBox = tuple[int, int, int, int]
Place = tuple[int, int]
"""Left, top."""


@dataclass(frozen=True)
class Canvas:
    """A picture.

    Attributes:
        pixels: grey values, shape (CANVAS, CANVAS).
        objects: box (x_min, y_min, x_max, y_max in pixels) and label of each digit, from top to bottom.
    """

    pixels: NDArray[np.uint8]
    objects: list[tuple[PixelBox, str]]


def make_digits_detect(folder: Path) -> None:
    """Write `images/PART-NNNN.png` and `data.jsonl` into a folder; the same each time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    from PIL import Image

    (folder / "images").mkdir()
    records = []
    for part, digits in divide(real_digits()).items():
        draw = random.Random(f"canvases of {part}")
        for number in range(ROWS[part]):
            canvas = draw_canvas(draw, digits)
            name = f"images/{part}-{number:04d}.png"
            Image.fromarray(canvas.pixels).save(folder / name)
            records.append(_record(canvas, f"{part}-{number:04d}", name, part))
    write_records(folder / "data.jsonl", records)


def divide(digits: Sequence[Digit]) -> dict[Literal["train", "valid", "test"], list[Digit]]:
    """The digits that each part's canvases are made of; none is in two parts."""
    order = list(digits)
    random.Random("parts").shuffle(order)
    first, second = (round(len(order) * share) for share in (SHARES["train"], SHARES["train"] + SHARES["valid"]))
    return {"train": order[:first], "valid": order[first:second], "test": order[second:]}


def draw_canvas(draw: random.Random, digits: Sequence[Digit]) -> Canvas:
    """One to three digits that do not touch each other."""
    import numpy as np

    pixels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    objects: list[tuple[PixelBox, str]] = []
    for left, top in _places(draw, draw.randint(1, MAX_DIGITS)):
        picture, label = draw.choice(digits)
        ink = np.kron(picture, np.ones((SCALE, SCALE), dtype=np.uint8))
        pixels[top : top + SIDE, left : left + SIDE] = ink
        rows, columns = (places.tolist() for places in np.nonzero(ink))
        box = (left + min(columns), top + min(rows), left + max(columns) + 1, top + max(rows) + 1)
        objects.append((box, label))
    return Canvas(pixels, sorted(objects, key=lambda one: (one[0][1], one[0][0])))


def _places(draw: random.Random, count: int) -> list[Place]:
    """Where digits stand; those that find no room are left out, but never the first."""
    places: list[Place] = []
    for _ in range(_TRIES):
        place = (draw.randrange(0, CANVAS - SIDE + 1, GRID), draw.randrange(0, CANVAS - SIDE + 1, GRID))
        if len(places) < count and all(_apart(place, other) for other in places):
            places.append(place)
    return places


def _apart(one: Place, other: Place) -> bool:
    """Whether two digits share no pixel."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= SIDE


def _record(canvas: Canvas, key: str, image: str, part: Literal["train", "valid", "test"]) -> dict[str, Any]:
    located = [Located(to_fractions(box, CANVAS, CANVAS), label) for box, label in canvas.objects]
    objects = [{"label": label, "box": list(box)} for box, label in canvas.objects]
    facts = {"width": CANVAS, "height": CANVAS, "objects": objects}
    return {"id": key, "image": image, "prefix": PREFIX, "suffix": to_text(located), "part": part, **facts}
