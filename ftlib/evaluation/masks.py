"""Masks of segmentation answers: what the generated codes stand for, and the codes that are to be learned."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace

from ftlib.data.examples import Bad, Example
from ftlib.data.intake import Encode
from ftlib.data.loc_tokens import to_text
from ftlib.data.located import answered_object, expected_mask
from ftlib.data.official.segmentation import read_mask, write_mask
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


def mask_encoder(codec: MaskCodec) -> Encode:
    """What gives rows whose answer is one object without codes, and whose facts have its `mask`, the mask's codes.

    The box becomes the mask's own. Other rows stay as they are; an empty mask makes a row `Bad`.
    """

    @functools.lru_cache(maxsize=1)  # the expressions about an object follow one another
    def written(mask: str, label: str) -> str:
        return to_text([codec.locate(read_mask(json.loads(mask)), label)])

    def encode(row: Example | Bad) -> Example | Bad:
        if isinstance(row, Bad) or not isinstance(row.facts.get("mask"), dict):
            return row
        one = answered_object(row.suffix)
        if one is None or one.mask:
            return row
        try:
            return replace(row, suffix=written(json.dumps(row.facts["mask"]), one.label))
        except ValueError as error:
            return Bad(row.place, f"field mask: {error}")

    return encode
