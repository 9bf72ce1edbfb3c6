"""Masks against pycocotools and against counting pixels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask

from ftlib.metrics.segmentation import from_pixels, from_polygons, from_run_lengths, measure, run_lengths
from ftlib.metrics.uncertainty import confidence_intervals

Pixels = NDArray[np.bool_]


def random_masks(seed: int, rows: int = 40) -> tuple[list[Pixels | None], list[Pixels]]:
    """Predictions and references; every fifth prediction is invalid, some are empty, some right."""
    draw = np.random.default_rng(seed)
    references, predictions = [], []
    for row in range(rows):
        height, width = draw.integers(1, 40, size=2)
        wanted = draw.random((height, width)) < draw.random()
        wanted[0, 0] = True
        flips = draw.random((height, width)) < draw.choice([0, 0.1, 0.5])
        references.append(wanted)
        predictions.append([None, wanted ^ flips, wanted, wanted & False, ~wanted][row % 5])
    return predictions, references


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_counting_pixels(seed: int) -> None:
    predictions, references = random_masks(seed)
    found = [None if one is None else from_pixels(one) for one in predictions]
    measured = measure(found, [from_pixels(one) for one in references])
    shared = [0 if p is None else int((p & r).sum()) for p, r in zip(predictions, references, strict=True)]
    union = [int((r if p is None else p | r).sum()) for p, r in zip(predictions, references, strict=True)]
    ious = [i / u for i, u in zip(shared, union, strict=True)]
    expected = {"mIoU": np.mean(ious), "cIoU": sum(shared) / sum(union)}
    expected |= {name: np.mean([iou >= t for iou in ious]) for name, t in (("P@.5", 0.5), ("P@.7", 0.7), ("P@.9", 0.9))}
    assert measured.values() == pytest.approx(expected)
    assert measured.rows == pytest.approx(ious)
    assert (measured.headline, measured.invalid, measured.n) == ("mIoU", 8, 40)


@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_to_pycocotools(seed: int) -> None:
    predictions, references = random_masks(seed)
    found = [from_pixels(np.zeros_like(r) if p is None else p) for p, r in zip(predictions, references, strict=True)]
    wanted = [from_pixels(one) for one in references]
    theirs = [float(mask.iou([p.rle], [r.rle], [0])[0, 0]) for p, r in zip(found, wanted, strict=True)]
    assert measure(found, wanted).rows == pytest.approx(theirs, abs=1e-15)


def test_a_weight_is_a_number_of_copies_of_an_image() -> None:
    predictions, references = random_masks(7)
    found = [None if one is None else from_pixels(one) for one in predictions]
    wanted = [from_pixels(one) for one in references]
    measured = measure(found, wanted, groups=[n // 4 for n in range(40)])
    weights = np.random.default_rng(0).integers(0, 4, size=10)
    copies = [n for n in range(40) for _ in range(weights[n // 4])]
    copied = measure([found[n] for n in copies], [wanted[n] for n in copies]).values()
    weighted = measured.sample.values(weights[None].astype(float))
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(copied)
    assert all(confidence_intervals(measured).values())


def test_an_iou_on_a_threshold_is_enough() -> None:
    wanted = np.ones((1, 10), dtype=bool)
    for pixels, name, value in ((5, "P@.5", 1), (7, "P@.7", 1), (9, "P@.9", 1), (4, "P@.5", 0), (8, "P@.9", 0)):
        found = np.arange(10)[None] < pixels
        assert measure([from_pixels(found)], [from_pixels(wanted)]).values()[name] == value


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_the_pixels(seed: int) -> None:
    for pixels in random_masks(seed)[1]:
        made = from_pixels(pixels)
        runs = run_lengths(made.counts)
        column_major = np.repeat(np.arange(len(runs)) % 2, runs).reshape(pixels.shape[::-1]).T
        assert (column_major == pixels).all()
        assert made.area == pixels.sum() == mask.area(made.rle)
        assert from_run_lengths(runs.tolist(), *pixels.shape) == made
        assert from_run_lengths(made.counts.decode(), *pixels.shape) == made


def test_long_runs() -> None:
    assert from_run_lengths("`1", 6, 8).area == 0
    pixels = np.zeros((3000, 2000), dtype=bool)
    pixels[5:2990, 300:1900] = True
    assert from_run_lengths(from_pixels(pixels).counts.decode(), 3000, 2000).area == pixels.sum()


def test_polygons_are_merged() -> None:
    made = from_polygons([[1, 1, 4, 1, 4, 3, 1, 3], [3.0, 2.0, 6.0, 2.0, 6.0, 5.0, 3.0, 5.0]], 6, 8)
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:3, 1:4] = expected[2:5, 3:6] = True
    assert made == from_pixels(expected)


@pytest.mark.parametrize(
    "polygons", [[], [[1, 1, 4, 1]], [[1, 1, 4, 1, 4]], [[1, 1, 4, 1, 4, "3"]], [7], [[0.0, 0, 1, 1, 0, float("nan")]]]
)
def test_bad_polygons(polygons: list[object]) -> None:
    with pytest.raises(ValueError, match="polygons"):
        from_polygons(polygons, 6, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "zzzzzz",
        "52203",
        "522000",
        "ä",
        "oooooooooooooooo0",
        "`1P",
        "`Q" + 13 * "P" + "0",
        [5, 2],
        [50, -2],
        [48.0],
        [True] * 48,
    ],
)
def test_bad_run_lengths(counts: object) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        from_run_lengths(counts, 6, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("far", [1e9, -1e15, 1e308, 10**99, 17, -9])
def test_polygons_far_outside_of_the_image(far: float) -> None:
    """pycocotools would take gigabytes for their outlines, or end the process."""
    with pytest.raises(ValueError, match="far outside of the image of 8 × 6 pixels"):
        from_polygons([[0, 0, 4, 0, far, 4]], 6, 8)
    from_polygons([[-8, -6, 16, 0, 16, 12]], 6, 8)


@pytest.mark.parametrize("size", [(1 << 16, 1 << 15), (10**30, 5), (1 << 63, 1)])
def test_images_that_are_too_large(size: tuple[int, int]) -> None:
    for made in (lambda: from_polygons([[0, 0, 4, 0, 4, 4]], *size), lambda: from_run_lengths([0, 20], *size)):
        with pytest.raises(ValueError, match="pixels is too large for a mask"):
            made()


@pytest.mark.parametrize("counts", [[10**30, 18], [-(10**30), 18], [1 << 31, 18]])
def test_run_lengths_beyond_all_measure(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths must be whole numbers from 0 to"):
        from_run_lengths(counts, 6, 8)


def test_masks_of_different_images() -> None:
    with pytest.raises(ValueError, match="size"):
        measure([from_pixels(np.ones((2, 3)))], [from_pixels(np.ones((3, 2)))])
