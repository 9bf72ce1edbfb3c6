"""Toy datasets without a download: real handwritten digits, several digits on a canvas, and string tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftlib.data.example import write_records
from ftlib.data.location_tokens import LocatedObject, format_objects, to_fractions
from ftlib.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# scikit-learn's 1,797 real handwritten digits as image files and JSONL: a dataset that needs no download.
#
# Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; 8 × 8 grey values 0…16.

PIXELS = 64
DIGITS_PREFIX = "which digit is this?"


def load_digits() -> list[tuple[NDArray[np.uint8], str]]:
    """Return every digit as 8 × 8 grey values 0…255, white on black, and its label.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits dataset comes with scikit-learn, which is not installed",
            "Make it in the container: jobs/run.sh ftlib stage CONFIG. In a clone: pip install -e '.[demo]'",
        ) from None
    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype("uint8")
    return [(picture, str(label)) for picture, label in zip(pictures, digits.target, strict=True)]


def make_digits(folder: Path) -> None:
    """Write `images/NNNN.png` (64 × 64, white on black) and `data.jsonl` into a folder.

    Raises:
        UserError: scikit-learn is not installed.
    """
    digits = load_digits()
    from PIL import Image

    (folder / "images").mkdir()
    records = []
    for number, (pixels, label) in enumerate(digits):
        name = f"images/{number:04d}.png"
        picture = Image.fromarray(pixels)
        picture.resize((PIXELS, PIXELS), Image.Resampling.NEAREST).save(folder / name)
        records.append({"id": f"{number:04d}", "image": name, "prefix": DIGITS_PREFIX, "suffix": label})
    write_records(folder / "data.jsonl", records)


# Real handwritten digits, several on a canvas, with the box of each: detection end to end without a download.
# The digits are those of `make_digits`. They are first split into train, valid and test, and the canvases of a split
# use only its digits, so that no digit is both trained on and evaluated. Boxes tightly enclose the digit's ink.

CANVAS = 48
"""Width and height in pixels."""

MAX_DIGITS = 3
SCALE = 2
"""Scale factor of digits, which have 8 × 8 pixels."""

SIDE = 8 * SCALE
GRID = 8
"""Positions are multiples of this, so that there are few coordinates to learn."""

DIGITS_DETECT_ROWS: dict[Literal["train", "valid", "test"], int] = {"train": 8000, "valid": 400, "test": 400}
SHARES = {"train": 0.7, "valid": 0.15, "test": 0.15}
"""Number of digits of each split, of 1,797."""

DIGITS_DETECT_PREFIX = "detect digits"
_TRIES = 50

Digit = tuple["NDArray[np.uint8]", str]
PixelBox = tuple[int, int, int, int]
Position = tuple[int, int]
"""Left, top."""


@dataclass(frozen=True)
class Canvas:
    """A canvas.

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
    for part, digits in split_digits(load_digits()).items():
        draw = random.Random(f"canvases of {part}")
        for number in range(DIGITS_DETECT_ROWS[part]):
            canvas = draw_canvas(draw, digits)
            name = f"images/{part}-{number:04d}.png"
            Image.fromarray(canvas.pixels).save(folder / name)
            records.append(_record(canvas, f"{part}-{number:04d}", name, part))
    write_records(folder / "data.jsonl", records)


def split_digits(digits: Sequence[Digit]) -> dict[Literal["train", "valid", "test"], list[Digit]]:
    """Return disjoint digits for the canvases of each split."""
    order = list(digits)
    random.Random("parts").shuffle(order)
    first, second = (round(len(order) * share) for share in (SHARES["train"], SHARES["train"] + SHARES["valid"]))
    return {"train": order[:first], "valid": order[first:second], "test": order[second:]}


def draw_canvas(draw: random.Random, digits: Sequence[Digit]) -> Canvas:
    """Return a canvas with one to three digits that do not touch."""
    import numpy as np

    pixels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    objects: list[tuple[PixelBox, str]] = []
    for left, top in _draw_positions(draw, draw.randint(1, MAX_DIGITS)):
        picture, label = draw.choice(digits)
        ink = np.kron(picture, np.ones((SCALE, SCALE), dtype=np.uint8))
        pixels[top : top + SIDE, left : left + SIDE] = ink
        rows, columns = (positions.tolist() for positions in np.nonzero(ink))
        box = (left + min(columns), top + min(rows), left + max(columns) + 1, top + max(rows) + 1)
        objects.append((box, label))
    return Canvas(pixels, sorted(objects, key=lambda one: (one[0][1], one[0][0])))


def _draw_positions(draw: random.Random, count: int) -> list[Position]:
    """Return positions of digits; digits without space are omitted, but never the first."""
    positions: list[Position] = []
    for _ in range(_TRIES):
        position = (draw.randrange(0, CANVAS - SIDE + 1, GRID), draw.randrange(0, CANVAS - SIDE + 1, GRID))
        if len(positions) < count and all(_apart(position, other) for other in positions):
            positions.append(position)
    return positions


def _apart(one: Position, other: Position) -> bool:
    """Whether two digits share no pixel."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= SIDE


def _record(canvas: Canvas, key: str, image: str, part: Literal["train", "valid", "test"]) -> dict[str, Any]:
    located = [LocatedObject(to_fractions(box, CANVAS, CANVAS), label) for box, label in canvas.objects]
    objects = [{"label": label, "box": list(box)} for box, label in canvas.objects]
    facts = {"width": CANVAS, "height": CANVAS, "objects": objects}
    return {
        "id": key,
        "image": image,
        "prefix": DIGITS_DETECT_PREFIX,
        "suffix": format_objects(located),
        "part": part,
        **facts,
    }


# String tasks as instructions with an input: a dataset of text that needs no download.
# `reverse`, `next` (every letter becomes the next one of the alphabet) and `count` (the letters) of random words. No
# word occurs twice, so held-out rows have unseen words.

STRING_TASKS_ROWS = 6000
LETTERS = "abcdefghijklmnop"
SHORTEST, LONGEST = 3, 6
SEED = 0

TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(chr(ord(letter) + 1) for letter in word),
    "count": lambda word: str(len(word)),
}


def make_string_tasks(folder: Path) -> None:
    """Write `data.jsonl` into a folder, as instructions with input and output."""
    write_records(folder / "data.jsonl", _records(random.Random(SEED)))


def _records(draw: random.Random) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    names = list(TASKS)
    while len(seen) < STRING_TASKS_ROWS:
        word = "".join(draw.choices(LETTERS, k=draw.randint(SHORTEST, LONGEST)))
        if word in seen:
            continue
        name = names[len(seen) % len(names)]
        seen.add(word)
        yield {"id": f"{len(seen):04d}", "instruction": name, "input": word, "output": TASKS[name](word)}
