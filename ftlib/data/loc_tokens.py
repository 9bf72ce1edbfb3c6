"""PaliGemma's words for boxes and masks: `<loc0123>` … and `<seg045>` ….

An object is four location tokens, y_min, x_min, y_max, x_max, for a mask sixteen segmentation tokens more, and then its
label; several are joined with " ; ": `<loc0100><loc0200><loc0300><loc0400> cat ; …`. A coordinate is a fraction of the
image's height or width; big_vision, with which PaliGemma was trained, writes round(fraction · 1023) and reads
number / 1023. Other tools divide by 1024; `divisor` serves their data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]

LARGEST = 1023
"""The last location token."""

SEG_TOKENS = 16
SEG_CODES = 128

_FRAGMENT = re.compile(
    rf"\s*<loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})>((?:<seg\d{{3}}>){{{SEG_TOKENS}}})?\s*([^<>]*?)\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Located:
    """An object in an image.

    Attributes:
        box: x_min, y_min, x_max, y_max as fractions of the image's width and height.
        label: what it is; may be empty.
        mask: the sixteen codes of its mask, 0…127; empty for a box alone.
    """

    box: Box
    label: str
    mask: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a text says.

    Attributes:
        unreadable: number of fragments that are no object: too few or too many tokens, or a box without extent.
    """

    objects: list[Located]
    unreadable: int


def to_fractions(box: Box, width: float, height: float) -> Box:
    """Pixels → fractions of the image's size; both x_min, y_min, x_max, y_max."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def to_pixels(box: Box, width: float, height: float) -> Box:
    """Fractions of the image's size → pixels; both x_min, y_min, x_max, y_max."""
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def to_text(objects: Sequence[Located], divisor: int = LARGEST) -> str:
    """Write objects as PaliGemma is trained to, so that `parse` reads the same objects again.

    What lies outside the image is cut off. A box narrower than a token is made one token wide, since one without extent
    is no object.

    Args:
        divisor: the token number of the image's far edge; numbers end at 1023.

    Raises:
        ValueError: a label that could not be read again (with ";", "<" or ">", or with space around it), a box that
            has no extent in the image, or mask codes that are not 16 of 0…127.
    """
    return " ; ".join(_one_text(one, divisor) for one in objects)


def parse(text: str, divisor: int = LARGEST) -> Parsed:
    """Read what a model wrote; never fails. An empty text names no object."""
    fragments = [fragment for fragment in text.split(";") if fragment.strip()]
    objects = [one for fragment in fragments if (one := _parse_one(fragment, divisor))]
    return Parsed(objects, len(fragments) - len(objects))


def _one_text(one: Located, divisor: int) -> str:
    if set(";<>") & set(one.label) or one.label != one.label.strip():
        raise ValueError(f'label {one.label!r}: ";", "<", ">" and space around it cannot be written beside tokens')
    if len(one.mask) not in (0, SEG_TOKENS) or not all(0 <= code < SEG_CODES for code in one.mask):
        raise ValueError(f"mask codes must be {SEG_TOKENS} numbers from 0 to {SEG_CODES - 1}, got {one.mask}")
    left, right = _edges(one.box[0], one.box[2], divisor, one.box)
    top, bottom = _edges(one.box[1], one.box[3], divisor, one.box)
    places = "".join(f"<loc{number:04d}>" for number in (top, left, bottom, right))
    mask = "".join(f"<seg{code:03d}>" for code in one.mask)
    return f"{places}{mask} {one.label}".rstrip()


def _edges(low: float, high: float, divisor: int, box: Box) -> tuple[int, int]:
    """The two numbers of an extent, the first smaller."""
    low, high = max(low, 0.0), min(high, 1.0)
    if not low < high:
        raise ValueError(f"box {box}: x_min < x_max and y_min < y_max are needed, inside the image")
    first, last = (min(round(edge * divisor), LARGEST) for edge in (low, high))
    if first == last:
        first, last = (first, last + 1) if last < LARGEST else (first - 1, last)
    return first, last


def _parse_one(fragment: str, divisor: int) -> Located | None:
    found = _FRAGMENT.fullmatch(fragment)
    if not found:
        return None
    top, left, bottom, right = (int(number) for number in found.groups()[:4])
    mask = tuple(int(code) for code in re.findall(r"\d+", found[5] or ""))
    if max(bottom, right) > LARGEST or any(code >= SEG_CODES for code in mask) or top >= bottom or left >= right:
        return None
    return Located((left / divisor, top / divisor, right / divisor, bottom / divisor), found[6], mask)
