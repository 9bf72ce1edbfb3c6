"""Masks of segmentation answers: decode generated codes, and encode target masks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace

from ftlib.data.example import Example, InvalidRecord
from ftlib.data.location_tokens import format_objects
from ftlib.data.scan import RowTransform
from ftlib.metrics.segmentation import from_pixels, read_mask, write_mask
from ftlib.models.mask_codec import MaskCodec
from ftlib.tasks.base import PredictionRecord
from ftlib.tasks.located import parse_single_object
from ftlib.tasks.segment import expected_mask


def with_masks(records: Sequence[PredictionRecord], codec: MaskCodec) -> list[PredictionRecord]:
    """Add `mask` to rows: run lengths in the expected mask's size; None if the answer is not one object with codes.

    Raises:
        UserError: a row has no expected mask.
    """
    found = []
    for record in records:
        expected = expected_mask(record)
        one = parse_single_object(record["prediction"])
        (pixels,) = codec.masks([one], expected.width, expected.height) if one else [None]
        found.append({**record, "mask": None if pixels is None else write_mask(from_pixels(pixels))})
    return found


def mask_encoder(codec: MaskCodec) -> RowTransform:
    """Return a transform that adds mask codes to answers with one object without codes and a `mask` in the facts.

    The box becomes the bounding box of the mask. Other rows are unchanged; a row with an empty mask becomes invalid.
    """

    @functools.lru_cache(maxsize=1)  # the expressions about an object are consecutive
    def written(mask: str, label: str) -> str:
        return format_objects([codec.locate(read_mask(json.loads(mask)), label)])

    def encode(row: Example | InvalidRecord) -> Example | InvalidRecord:
        if isinstance(row, InvalidRecord) or not isinstance(row.facts.get("mask"), dict):
            return row
        one = parse_single_object(row.suffix)
        if one is None or one.mask:
            return row
        try:
            return replace(row, suffix=written(json.dumps(row.facts["mask"]), one.label))
        except ValueError as error:
            return InvalidRecord(row.location, f"field mask: {error}")

    return encode
