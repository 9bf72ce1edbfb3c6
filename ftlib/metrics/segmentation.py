"""Masks of referring expressions: mean and cumulative IoU, precision at IoU thresholds.

Masks are stored as COCO's run lengths, column by column, and computed with pycocotools.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftlib.metrics.base import Array, GroupedSums, MetricResult, divide

RULE = "referring-segmentation/1"

MAX_PIXELS = 1 << 31
"""Per image; pycocotools counts in 32 bits."""

THRESHOLDS = (0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask of an image.

    Attributes:
        height, width: of the image.
        counts: COCO's compressed run lengths.
    """

    height: int
    width: int
    counts: bytes

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(run_lengths(self.counts)[1::2].sum())

    @property
    def rle(self) -> dict[str, Any]:
        """The mask in the form of pycocotools."""
        return {"size": [self.height, self.width], "counts": self.counts}


def measure(
    predictions: Sequence[Mask | None], references: Sequence[Mask], groups: Sequence[Hashable] | None = None
) -> MetricResult:
    """Score one mask for each expression.

    mIoU is the mean of the rows' IoU (big_vision's headline), cIoU the sum of all intersections over the sum of all
    unions (the older papers'), P@.5, P@.7 and P@.9 the shares of rows with at least that IoU.

    Args:
        predictions: None for an answer without a mask, which has no intersection.
        references: masks of the same images, none empty.
        groups: the image of each row; default: every row is its own group.

    Raises:
        ValueError: a prediction and its reference are of different size.
    """
    areas = [_areas(found, wanted) for found, wanted in zip(predictions, references, strict=True)]
    shared, union = np.array(areas, dtype=np.float64).reshape(-1, 2).T
    rows: Array = divide(shared, union)
    sums = GroupedSums(range(len(rows)) if groups is None else groups)
    sums.add_ratio("mIoU", rows)
    sums.add_ratio("cIoU", shared, union)
    for threshold in THRESHOLDS:
        sums.add_ratio(f"P@{threshold}".replace("0.", "."), rows >= threshold)
    invalid = sum(found is None for found in predictions)
    return MetricResult(RULE, "mIoU", "fraction", sums, len(rows), rows.tolist(), invalid)


def from_pixels(pixels: ArrayLike) -> Mask:
    """A mask from an array, shape (height, width), nonzero inside the mask."""
    from pycocotools import mask

    inside = np.asfortranarray(pixels) != 0
    height, width = inside.shape
    return Mask(height, width, mask.encode(inside.astype(np.uint8, order="F"))["counts"])


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Mask:
    """The union of COCO's polygons [x, y, x, y, …] as a mask.

    Raises:
        ValueError: no polygon, fewer than three points, values that are not numbers, points farther from the image than
            its width or height (pycocotools needs memory for the whole outline), or an image that is too large.
    """
    from pycocotools import mask

    _require_size(height, width)
    if not polygons or not all(_is_polygon(one) for one in polygons):
        raise ValueError("polygons must be lists of numbers [x, y, x, y, …], at least three points each")
    if not all(_is_near_image(points[::2], width) and _is_near_image(points[1::2], height) for points in polygons):
        raise ValueError(f"polygons lie far outside of the image of {width} × {height} pixels")
    rle = mask.merge(mask.frPyObjects([list(map(float, one)) for one in polygons], height, width))
    return Mask(height, width, rle["counts"])


def from_run_lengths(counts: str | Sequence[int], height: int, width: int) -> Mask:
    """A mask from COCO's run lengths, compressed (text) or not (numbers).

    Raises:
        ValueError: they are not readable, or do not fill the image; an image too large.
    """
    from pycocotools import mask

    _require_size(height, width)
    if not isinstance(counts, str) and not all(type(count) is int and 0 <= count < MAX_PIXELS for count in counts):
        raise ValueError(f"run lengths must be whole numbers from 0 to {MAX_PIXELS - 1}")
    runs = run_lengths(counts.encode()) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    if (runs < 0).any() or (runs >= MAX_PIXELS).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths must be positive and fill the image of {height} × {width} pixels")
    rle = mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return Mask(height, width, rle["counts"])


def _require_size(height: int, width: int) -> None:
    if height * width >= MAX_PIXELS:
        raise ValueError(f"an image of {height} × {width} pixels is too large for a mask")


def overlaps(found: Sequence[Mask], wanted: Sequence[Mask], crowd: NDArray[np.bool_]) -> Array:
    """IoU of each mask with each of the others; for a crowd the share of the mask inside it.

    Args:
        crowd: which of `wanted` are crowds, shape (wanted,).

    Returns:
        Shape (found, wanted).
    """
    from pycocotools import mask

    if not found or not wanted:
        return np.zeros((len(found), len(wanted)))
    shares: Array = mask.iou([one.rle for one in found], [one.rle for one in wanted], crowd.astype(np.uint8).tolist())
    return shares


def box_around(mask: Mask) -> tuple[float, float, float, float]:
    """The bounding box of a mask: x, y, width and height in pixels, all 0 for an empty mask."""
    from pycocotools import mask as coco

    x, y, width, height = (float(edge) for edge in coco.toBbox(mask.rle))
    return x, y, width, height


def run_lengths(counts: bytes) -> NDArray[np.int64]:
    """The numbers in COCO's compressed run lengths: pixels out, in, out, in … of the mask, column by column.

    Characters carry five bits from 48 on, the lowest first, a sixth says that more follow, the highest bit of a number
    is its sign; from the fourth number on the difference to the last but one is what is written.

    Raises:
        ValueError: not such text.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not COCO's compressed run lengths")
    starts = np.concatenate([[0], np.flatnonzero(~codes & 32)[:-1] + 1])
    sizes = np.diff(np.append(starts, len(codes)))
    if sizes.max() > 12:
        raise ValueError("not COCO's compressed run lengths")
    places = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= np.where(codes[starts + sizes - 1] & 16, np.int64(1) << 5 * sizes, 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _areas(found: Mask | None, wanted: Mask) -> tuple[int, int]:
    """Pixels of the intersection, and of the union."""
    from pycocotools import mask

    if found is None:
        return 0, wanted.area
    if (found.height, found.width) != (wanted.height, wanted.width):
        raise ValueError("masks of images of different size")
    shared = int(mask.area(mask.merge([found.rle, wanted.rle], intersect=True)))
    return shared, found.area + wanted.area - shared


def _is_near_image(numbers: Sequence[float], edge: int) -> bool:
    """Whether coordinates are at most the image's width, or height, away from it."""
    return -edge <= min(numbers) and max(numbers) <= 2 * edge


def _is_polygon(points: Any) -> bool:
    numbers = isinstance(points, Sequence) and all(type(one) in (int, float) and math.isfinite(one) for one in points)
    return numbers and len(points) >= 6 and len(points) % 2 == 0


def read_mask(value: dict[str, Any]) -> Mask:
    """A mask from its JSON form (see above).

    Raises:
        ValueError: it is none.
    """
    size = value.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"field mask: size [height, width] is needed, found {size!r}"[:200])
    if isinstance(value.get("polygons"), list):
        return from_polygons(value["polygons"], *size)
    if not isinstance(value.get("counts"), (str, list)):
        raise ValueError("field mask: counts (run lengths) or polygons are needed")
    return from_run_lengths(value["counts"], *size)


def read_segmentation(value: Any, height: int | None, width: int | None) -> Mask:
    """A mask from the field `segmentation` of a COCO file: polygons, or run lengths with or without a size.

    Args:
        height, width: of the image, where they are known.

    Raises:
        ValueError: it is none of these, or of another size.
    """
    run_lengths = value if isinstance(value, dict) else {}
    own = run_lengths.get("size")
    size = [height, width] if height and width else own
    if own is not None and own != size:
        raise ValueError(f"field segmentation: its size is {own}, the image's {size}"[:200])
    form = {"polygons": value} if isinstance(value, list) else {"counts": run_lengths.get("counts")}
    if size is None and isinstance(value, list):
        raise ValueError("field segmentation: polygons need the image's width and height")
    try:
        return read_mask({"size": size, **form})
    except ValueError as error:
        raise ValueError(f"field segmentation: {error}") from None


def write_mask(mask: Mask) -> dict[str, Any]:
    """A mask as JSON, with compressed run lengths."""
    return {"size": [mask.height, mask.width], "counts": mask.counts.decode()}
