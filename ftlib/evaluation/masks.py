"""Masks of segmentation answers: what the generated codes stand for, kept with each row."""

from __future__ import annotations

from collections.abc import Sequence

from ftlib.data.located import answered_object, expected_mask
from ftlib.data.official.segmentation import write_mask
from ftlib.metrics.masks import from_pixels
from ftlib.models.mask_decoder import MaskCodec
from ftlib.tasks import Record


def with_masks(records: Sequence[Record], codec: MaskCodec) -> list[Record]:
    """Rows with `mask`: run lengths in the expected mask's size; None for an answer that is not one object with codes.

    Raises:
        UserError: a row without an expected mask.
    """
    found = []
    for record in records:
        expected = expected_mask(record)
        one = answered_object(record["prediction"])
        (pixels,) = codec.masks([one], expected.width, expected.height) if one else [None]
        found.append({**record, "mask": None if pixels is None else write_mask(from_pixels(pixels))})
    return found
