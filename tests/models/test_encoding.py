"""Levels of images in batches, and the values that a model sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ftlib.models.encoding import look_up, model_inputs, split_batch
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_processor


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """All levels of all channels, in two images."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return [
        Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=-1)),
        Image.radial_gradient("L").convert("RGB"),
    ]


@pytest.mark.gates
def test_values_of_levels_are_those_of_the_processor_bit_for_bit(pictures: list[Image.Image]) -> None:
    processor = tiny_processor(16, 8)
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std = (
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    )
    inputs = PaliGemmaInputProcessor(processor)
    rows = [inputs.encode_train("a", images, "b") for images in (pictures[0], [], [pictures[1], pictures[0]])]
    batch = inputs.collate(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    found = model_inputs(batch)["pixel_values"]
    assert found.is_contiguous()  # else a convolution may add up in another order
    for image, values in zip([pictures[0], pictures[1], pictures[0]], found, strict=True):
        pixels = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
        expected = (pixels / 255.0 - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
        assert np.array_equal(values.permute(1, 2, 0).numpy(), expected)
    assert look_up({"pixel_values": found})["pixel_values"] is found


def test_a_split_batch_has_values_where_it_has_images(pictures: list[Image.Image]) -> None:
    inputs = PaliGemmaInputProcessor(tiny_processor(16, 8))
    rows = [inputs.encode_train("a", images, "b") for images in (pictures, [], pictures[1])]
    batch = inputs.collate(rows)
    pieces = split_batch(batch, 1)
    names = set(batch)
    of_images = {"pixel_values", "pixel_values_per_row", "pixel_values_lookup"}
    assert [set(piece) for piece in pieces] == [names, names - of_images, names]
    together = torch.cat([look_up(piece)["pixel_values"] for piece in (pieces[0], pieces[2])])
    assert torch.equal(together, look_up(batch)["pixel_values"])
