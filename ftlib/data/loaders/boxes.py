"""Objects of COCO's files → boxes as location tokens and in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.data import loc_tokens
from ftlib.data.loc_tokens import Located
from ftlib.data.official.detection import parse_object, parse_picture
from ftlib.metrics.boxes import Box, Object


@dataclass(frozen=True, slots=True)
class SizedPicture:
    """An image of which name, width and height are known."""

    id: int
    name: str
    width: int
    height: int


def sized_picture(record: dict[str, Any]) -> tuple[int, SizedPicture]:
    """Parse an image record.

    Raises:
        ValueError: what is wrong with it.
    """
    found = parse_picture(record)
    if not found.file_name or not found.width or not found.height or min(found.width, found.height) < 1:
        raise ValueError("file_name, width and height are needed")
    return found.id, SizedPicture(found.id, found.file_name, found.width, found.height)


def an_object(record: dict[str, Any]) -> tuple[int, Object]:
    """Parse an annotation.

    Raises:
        ValueError: what is wrong with it.
    """
    found = parse_object(record)
    return found.id, found


def corners(box: Box) -> list[float]:
    """x, y, width, height → x_min, y_min, x_max, y_max."""
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def to_text(objects: Sequence[Object], picture: SizedPicture, labels: Mapping[int, str]) -> str:
    """Write objects as location tokens.

    Args:
        labels: category id → label; none where only the place is asked for.

    Raises:
        ValueError: a label that location tokens cannot have.
    """
    return loc_tokens.to_text([_located(one, picture, labels.get(one.category, "")) for one in objects])


def visible(one: Object, picture: SizedPicture) -> bool:
    """Whether any of an object lies inside the image."""
    left, top, right, bottom = corners(one.box)
    return max(left, 0) < min(right, picture.width) and max(top, 0) < min(bottom, picture.height)


def _located(one: Object, picture: SizedPicture, label: str) -> Located:
    left, top, right, bottom = corners(one.box)
    return Located(loc_tokens.to_fractions((left, top, right, bottom), picture.width, picture.height), label)
