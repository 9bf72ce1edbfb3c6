"""PaliGemma's text format for boxes and masks: `<loc0123>` … and `<seg045>` ….

An object is four location tokens (y_min, x_min, y_max, x_max), for a mask also sixteen segmentation tokens, and its
label; objects are joined with " ; ": `<loc0100><loc0200><loc0300><loc0400> cat ; …`. A coordinate is a fraction of the
image's height or width; big_vision, which trained PaliGemma, writes round(fraction · 1023) and reads number / 1023.
Other tools divide by 1024; set `divisor` for their data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]

MAX_LOCATION = 1023
"""The last location token."""

SEG_TOKENS = 16
SEG_CODES = 128

_ROUNDING = 0.005
_ROUNDING_PIXELS = 2.0

_TOKEN = re.compile(r"<(loc|seg)([^<>]*)>")
_SPACE = " \t\n\r\f\v"
_OBJECT = re.compile(
    rf"<loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})>((?:<seg\d{{3}}>){{{SEG_TOKENS}}})?", re.ASCII
)
"""The tokens before a label. The label and the whitespace around it are not part of the pattern, because matching them
would take quadratic time."""


@dataclass(frozen=True, slots=True)
class LocatedObject:
    """An object in an image.

    Attributes:
        box: x_min, y_min, x_max, y_max as fractions of the image's width and height.
        label: its class or description; may be empty.
        mask: the sixteen codes of its mask, 0…127; empty for a box without a mask.
    """

    box: Box
    label: str
    mask: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedObjects:
    """The objects of a text.

    Attributes:
        unreadable: number of invalid fragments: too few or too many tokens, or an empty box.
    """

    objects: list[LocatedObject]
    unreadable: int


def to_fractions(box: Box, width: float, height: float) -> Box:
    """Convert pixels to fractions of the image's size; both are x_min, y_min, x_max, y_max."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def to_pixels(box: Box, width: float, height: float) -> Box:
    """Convert fractions of the image's size to pixels; both are x_min, y_min, x_max, y_max."""
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def tolerance(edge: float) -> float:
    """Return the tolerated rounding error of a box edge in pixels: 2, or half a percent of the image's `edge`."""
    return max(_ROUNDING_PIXELS, _ROUNDING * edge)


def exceeds_image(box: Sequence[float], width: float, height: float) -> bool:
    """Whether a box (x_min, y_min, x_max, y_max in pixels) exceeds its image by more than rounding."""
    beyond_x, beyond_y = tolerance(width), tolerance(height)
    return not (
        box[0] >= -beyond_x and box[1] >= -beyond_y and box[2] <= width + beyond_x and box[3] <= height + beyond_y
    )


def format_objects(objects: Sequence[LocatedObject], divisor: int = MAX_LOCATION) -> str:
    """Return objects in PaliGemma's format; `parse_objects` is the inverse.

    Boxes are clipped to the image. A box narrower than one token is made one token wide.

    Args:
        divisor: the token number of the image's far edge; the highest token is 1023.

        Raises:
            ValueError: a label that cannot be parsed (with ";", "<" or ">", or whitespace around it), a box that is
                empty
                inside the image, or mask codes that are not 16 numbers of 0…127.
    """
    return " ; ".join(_format_object(one, divisor) for one in objects)


def parse_objects(text: str, divisor: int = MAX_LOCATION) -> ParsedObjects:
    """Parse a model's output; never fails. An empty text has no objects."""
    fragments = [fragment for fragment in text.split(";") if fragment.strip()]
    objects = [one for fragment in fragments if (one := _parse_object(fragment, divisor))]
    return ParsedObjects(objects, len(fragments) - len(objects))


def object_spans(text: str) -> list[tuple[range, range]]:
    """Return where the objects of `parse_objects` are in the text: characters of the location tokens, of the label."""
    spans, start = [], 0
    for fragment in text.split(";"):
        if _parse_object(fragment, MAX_LOCATION):
            first = start + len(fragment) - len(fragment.lstrip(_SPACE))
            end = start + len(fragment.rstrip(_SPACE))
            found = _OBJECT.match(text, first)
            assert found
            spans.append((range(first, first + 4 * len("<loc0000>")), range(found.end(), end)))
        start += len(fragment) + 1
    return spans


def label_error(label: str) -> str:
    """Return why a label cannot be written after tokens; "" if it can."""
    if not label.strip():
        return "a label is needed"
    if set(";<>") & set(label) or label != label.strip():
        return f'label {label!r}: must not contain ";", "<", ">" or whitespace around it'
    return ""


def find_errors(text: str) -> list[str]:
    """Return a message for each object that `parse_objects` rejects, with its number and label."""
    fragments = [fragment for fragment in text.split(";") if fragment.strip()]
    return [
        f"object {number}{_name_fragment(fragment)}: {_why_unread(fragment)}"
        for number, fragment in enumerate(fragments, 1)
        if not _parse_object(fragment, MAX_LOCATION)
    ]


def _name_fragment(fragment: str) -> str:
    label = _TOKEN.sub("", fragment).strip()
    return f" ({label})" if label else ""


def _why_unread(fragment: str) -> str:
    tokens = _TOKEN.findall(fragment)
    for kind, number in tokens:
        digits, end = (4, MAX_LOCATION) if kind == "loc" else (3, SEG_CODES - 1)
        if not (len(number) == digits and number.isascii() and number.isdecimal() and int(number) <= end):
            return f"<{kind}{number}> is not a token; tokens are <{kind}{0:0{digits}d}> to <{kind}{end:0{digits}d}>"
    edges = [int(number) for kind, number in tokens if kind == "loc"]
    if len(edges) != 4:
        return f"{len(edges)} location tokens, but a box has 4: y_min, x_min, y_max, x_max"
    if len(tokens) - 4 not in (0, SEG_TOKENS):
        return f"{len(tokens) - 4} segmentation tokens, but a mask has {SEG_TOKENS}"
    for name, (low, high) in (("y", edges[::2]), ("x", edges[1::2])):
        if low == high:
            return f"its box has no {'height' if name == 'y' else 'width'}: {name}_min and {name}_max are both {low}"
        if low > high:
            return f"{name}_min {low} is larger than {name}_max {high}; the order is y_min, x_min, y_max, x_max"
    return "tokens must come first, then the label, without < and >"


def _format_object(one: LocatedObject, divisor: int) -> str:
    if one.label and (fault := label_error(one.label)):
        raise ValueError(fault)
    if len(one.mask) not in (0, SEG_TOKENS) or not all(0 <= code < SEG_CODES for code in one.mask):
        raise ValueError(f"mask codes must be {SEG_TOKENS} numbers from 0 to {SEG_CODES - 1}, got {one.mask}")
    left, right = _edges(one.box[0], one.box[2], divisor, one.box)
    top, bottom = _edges(one.box[1], one.box[3], divisor, one.box)
    places = "".join(f"<loc{number:04d}>" for number in (top, left, bottom, right))
    mask = "".join(f"<seg{code:03d}>" for code in one.mask)
    return f"{places}{mask} {one.label}".rstrip()


def _edges(low: float, high: float, divisor: int, box: Box) -> tuple[int, int]:
    """Return the token numbers of an interval, the first one smaller."""
    low, high = max(low, 0.0), min(high, 1.0)
    if not low < high:
        raise ValueError(f"box {box}: must have x_min < x_max and y_min < y_max inside the image")
    first, last = (min(round(edge * divisor), MAX_LOCATION) for edge in (low, high))
    if first == last:
        first, last = (first, last + 1) if last < MAX_LOCATION else (first - 1, last)
    return first, last


def _parse_object(fragment: str, divisor: int) -> LocatedObject | None:
    fragment = fragment.strip(_SPACE)
    found = _OBJECT.match(fragment)
    label = fragment[found.end() :].lstrip(_SPACE) if found else ""
    if not found or "<" in label or ">" in label:
        return None
    top, left, bottom, right = (int(number) for number in found.groups()[:4])
    mask = tuple(int(code) for code in re.findall(r"\d+", found[5] or ""))
    if max(bottom, right) > MAX_LOCATION or any(code >= SEG_CODES for code in mask) or top >= bottom or left >= right:
        return None
    return LocatedObject((left / divisor, top / divisor, right / divisor, bottom / divisor), label, mask)
