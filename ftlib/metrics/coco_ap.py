"""COCO's average precision and recall of detections (boxes and masks), and box accuracy of referring expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics import segmentation
from ftlib.metrics.base import Array, GroupedSums, MetricResult, divide
from ftlib.metrics.segmentation import Mask

RULE = "coco-box-ap/pycocotools-2.0"
MASK_RULE = "coco-mask-ap/pycocotools-2.0"
REFERRING_RULE = "box-accuracy@.5/1"

Box = tuple[float, float, float, float]
Id = int | str


@dataclass(frozen=True, slots=True)
class GroundTruthObject:
    """An annotated object.

    Attributes:
        box: x, y, width, height in pixels.
        area: in square pixels; decides between small, medium and large (COCO: of the mask, not of the box).
        crowd: a group in one box; it need not be found, and detections in it are not counted.
    """

    id: Id
    image: Id
    category: Id
    box: Box
    area: float
    crowd: bool = False
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Detection:
    """A predicted object.

    Attributes:
        box: x, y, width, height in pixels.
        size: area in square pixels, if it differs from the box's.
    """

    image: Id
    category: Id
    box: Box
    score: float
    size: float | None = None
    mask: Mask | None = None

    @property
    def area(self) -> float:
        """Area in square pixels, for the ranges small, medium and large."""
        return self.box[2] * self.box[3] if self.size is None else self.size


def average_precision(
    images: Sequence[Id], objects: Sequence[GroundTruthObject], detections: Sequence[Detection]
) -> MetricResult:
    """COCO's detection metrics (cocodataset.org, "Detection evaluation"; program: pycocotools' COCOeval).

    AP is the mean over IoU thresholds .5, .55 … .95, over 101 recall levels and over the categories that have objects.
    Up to 100 detections per image and category count. A quirk is kept: an object with id 0 is never found. If all
    objects and detections have masks, the same metrics are added for masks.

    Args:
        images: the ids of all images, with objects or without.

    Returns:
        AP, AP50, AP75, AP by area, AR-1, AR-10, AR-100 (limits on the detections) and AR-100 by area; NaN where no
        category has such objects (pycocotools: -1). n counts images.
    """
    groups = _ordered(images)
    image_index = {image: index for index, image in enumerate(groups)}
    categories = {category: index for index, category in enumerate(_ordered({one.category for one in objects}))}
    truth_keys = np.array(
        [categories[one.category] * len(groups) + image_index[one.image] for one in objects], np.int64
    )
    order = np.argsort(truth_keys, kind="stable")
    wanted, truth_keys = [objects[index] for index in order], truth_keys[order]
    judged = [one for one in detections if one.category in categories]
    keys = np.array([categories[one.category] * len(groups) + image_index[one.image] for one in judged], np.int64)
    order, ranks = _best_first(keys, judged)
    found, keys = [judged[index] for index in order], keys[order]
    crowd = np.array([one.crowd for one in wanted], dtype=np.bool_)
    ignored = crowd[:, None] | ~_in_ranges(np.array([one.area for one in wanted], dtype=np.float64))
    truth = GroundTruth(truth_keys, crowd, ignored)
    by_box = DetectionMetric(groups, truth, _match(found, keys, ranks, truth, wanted, _by_box(found, wanted, crowd)))
    if not detections or any(one.mask is None for one in objects) or any(one.mask is None for one in detections):
        return MetricResult(RULE, "AP", "fraction", by_box, len(groups))
    overlap = _by_mask(found, keys, wanted, truth)
    by_mask = DetectionMetric(groups, truth, _match(found, keys, ranks, truth, wanted, overlap))
    return MetricResult(f"{RULE}, {MASK_RULE}", "AP", "fraction", _BoxAndMaskMetric(by_box, by_mask), len(groups))


@dataclass(frozen=True)
class _BoxAndMaskMetric:
    """Metrics of boxes, and of masks with the prefix `mask`."""

    boxes: DetectionMetric
    masks: DetectionMetric

    @property
    def groups(self) -> Sequence[Hashable]:
        return self.boxes.groups

    def values(self, weights: Array) -> dict[str, Array]:
        """See `ResampleableMetric.values`."""
        masks = {f"mask {name}": value for name, value in self.masks.values(weights).items()}
        return self.boxes.values(weights) | masks


def _ordered(ids: Collection[Id]) -> list[Id]:
    """Ids in the order of pycocotools: numerically or, if there are any strings, all as strings."""
    return sorted(ids, key=None if all(isinstance(one, int) for one in ids) else str)


def _best_first(keys: Ints, detections: Sequence[Detection]) -> tuple[Ints, Ints]:
    """The detections that count, ordered by key and descending score, and the rank of each within its key."""
    scores = np.array([one.score for one in detections], dtype=np.float64)
    order = np.lexsort((-scores, keys))
    ranks = np.arange(len(order)) - np.searchsorted(keys[order], keys[order])
    kept = ranks < LIMITS[-1]
    return order[kept], ranks[kept]


def _by_box(found: Sequence[Detection], wanted: Sequence[GroundTruthObject], crowd: Bools) -> Overlap:
    boxes = np.array([one.box for one in found], dtype=np.float64).reshape(-1, 4)
    others = np.array([one.box for one in wanted], dtype=np.float64).reshape(-1, 4)
    return lambda mine, other: overlaps(boxes[mine], others[other], crowd[other])


def _by_mask(
    found: Sequence[Detection], keys: Ints, wanted: Sequence[GroundTruthObject], truth: GroundTruth
) -> Overlap:
    def overlap(mine: Ints, other: Ints) -> Array:
        blocks = [np.zeros(0)]
        for key in np.unique(keys[mine]):
            first, end = np.searchsorted(keys, (key, key + 1))
            begin, last = np.searchsorted(truth.keys, (key, key + 1))
            here = [one.mask for one in found[first:end] if one.mask]
            there = [one.mask for one in wanted[begin:last] if one.mask]
            blocks.append(segmentation.overlaps(here, there, truth.crowd[begin:last]).ravel())
        return np.concatenate(blocks)

    return overlap


def _match(
    found: Sequence[Detection],
    keys: Ints,
    ranks: Ints,
    truth: GroundTruth,
    wanted: Sequence[GroundTruthObject],
    overlap: Overlap,
) -> MatchedDetections:
    """Match detections with objects."""
    scores = np.array([one.score for one in found], dtype=np.float64)
    taken = match_detections(keys, overlap, truth)
    inside = _in_ranges(np.array([one.area for one in found], dtype=np.float64))
    if not wanted:
        found_ignored = matched = np.zeros(taken.shape, dtype=np.bool_)
    else:
        real = np.array([one.id != 0 for one in wanted], dtype=np.bool_)
        found_ignored = (taken >= 0) & truth.ignored[taken, np.arange(len(RANGES))[:, None]]
        matched = (taken >= 0) & real[taken]
    hits = matched & ~found_ignored
    counted = ~found_ignored & (matched | inside[:, :, None])
    return MatchedDetections(keys, scores, ranks, inside, hits, counted)


def _in_ranges(areas: Array) -> Bools:
    """Which area ranges contain an area, shape (n,) → (n, A)."""
    low, high = np.array(list(RANGES.values())).T
    return (low <= areas[:, None]) & (areas[:, None] <= high)


def accuracy(
    predictions: Sequence[Box | None], references: Sequence[Box], groups: Sequence[Hashable] | None = None
) -> MetricResult:
    """Share of referring expressions whose predicted box has an IoU of at least .5 with the reference.

    Args:
        predictions, references: x_min, y_min, x_max, y_max; None for an answer without a box, which is wrong.
        groups: the image of each row; default: every row is its own group.
    """
    answered = np.array([box or (0, 0, 0, 0) for box in predictions], dtype=np.float64).reshape(-1, 4)
    asked = np.array(references, dtype=np.float64).reshape(-1, 4)
    hits = (overlaps(_xyxy_to_xywh(answered), _xyxy_to_xywh(asked)) >= THRESHOLDS[0]).astype(np.float64)
    sums = GroupedSums(range(len(references)) if groups is None else groups)
    sums.add_ratio("accuracy@.5", hits)
    invalid = sum(box is None for box in predictions)
    return MetricResult(REFERRING_RULE, "accuracy@.5", "fraction", sums, len(references), hits.tolist(), invalid)


def _xyxy_to_xywh(corners: Array) -> Array:
    """x_min, y_min, x_max, y_max → x, y, width, height."""
    return np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])


# Matching of detections and objects: overlaps and COCO's greedy assignment, for all images at once.
#
# Within an image and a category, detections in order of score take the free object with the largest overlap. This is
# done separately for every IoU threshold and area range, because the ignored objects differ. Here the n-th detections
# of many images are assigned together.

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds .5, .55 … .95, bit-identical with COCO's."""

Overlap = Callable[[Ints, Ints], Array]
"""(detections, objects), shape (pairs,) each → IoU, shape (pairs,). Pairs are ordered by key and detection; each
detection is paired with all objects of its key."""

_TOGETHER = 1 << 14


@dataclass(frozen=True)
class GroundTruth:
    """Objects, ordered by `keys`; within a key in the order of the annotation file.

    Attributes:
        keys: image and category as one number, shape (G,).
        crowd: which objects are crowds, which can match many detections, shape (G,).
        ignored: objects that need not be found, by area range, shape (G, A); crowds always.
    """

    keys: Ints
    crowd: Bools
    ignored: Bools


@dataclass(frozen=True)
class _PaddedGroups:
    """Images with similar numbers of objects of a category, those with most detections first.

    Attributes:
        first, counts: index of each image's first detection, and their number, shape (n,).
        objects: indices of its objects, the last first, shape (n, width).
        present: False where a row has fewer objects, shape (n, width).
    """

    first: Ints
    counts: Ints
    objects: Ints
    present: Bools


def overlaps(boxes: Array, others: Array, crowd: Bools | bool = False) -> Array:
    """IoU of boxes (x, y, width, height), row by row; for crowds the share of the box inside.

    Args:
        boxes, others: shape (n, 4).
        crowd: which of `others` are crowds, shape (n,).

    Returns:
        Shape (n,); 0 where they only touch.
    """
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, 2:] + boxes[:, :2], others[:, 2:] + others[:, :2])
    sides = high - low
    shared = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowd, area, area + others[:, 2] * others[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros(len(boxes)), where=shared > 0)


def match_detections(keys: Ints, overlap: Overlap, ground_truth: GroundTruth) -> Ints:
    """The object matched by each detection, for every area range and threshold (rules: pycocotools' COCOeval).

    Args:
        keys: image and category of each detection as one number, ascending; within a key the best score first, (D,).
        overlap: of every detection with every object of its key, see `Overlap`.

    Returns:
        Index of the object or -1, shape (D, A, thresholds).
    """
    found = np.full((len(keys), ground_truth.ignored.shape[1], len(THRESHOLDS)), -1, dtype=np.int64)
    begin, end = (np.searchsorted(ground_truth.keys, keys, side) for side in ("left", "right"))
    mine = np.repeat(np.arange(len(keys)), end - begin)
    offsets = np.cumsum(end - begin) - (end - begin)
    other = np.arange(len(mine)) - (offsets - begin)[mine]
    iou = overlap(mine, other)
    able = np.unique(mine[iou >= THRESHOLDS[0]])  # the others match nothing and block nothing
    for table in _padded_groups(keys[able], ground_truth.keys):
        taken = np.zeros((len(table.first), *found.shape[1:], table.objects.shape[1]), dtype=np.bool_)
        for turn in range(int(table.counts.max())):
            rows = able[table.first[table.counts > turn] + turn]
            objects, present = table.objects[: len(rows)], table.present[: len(rows)]
            cells = np.where(present, (offsets - begin)[rows, None] + objects, 0)
            found[rows] = _match_one_each(
                np.where(present, iou[cells], -1.0), objects, ground_truth, taken[: len(rows)]
            )
    return found


def _padded_groups(keys: Ints, truth_keys: Ints) -> Iterator[_PaddedGroups]:
    pairs, first, counts = np.unique(keys, return_index=True, return_counts=True)
    begin, end = (np.searchsorted(truth_keys, pairs, side) for side in ("left", "right"))
    widths = 1 << np.ceil(np.log2(end - begin)).astype(np.int64)
    for width in np.unique(widths):
        alike = np.flatnonzero(widths == width)
        alike = alike[np.argsort(-counts[alike], kind="stable")]
        for part in np.split(alike, range(_TOGETHER // width, len(alike), _TOGETHER // width)):
            objects = end[part, None] - 1 - np.arange(width)
            present = objects >= begin[part, None]
            yield _PaddedGroups(first[part], counts[part], np.where(present, objects, 0), present)


def _match_one_each(iou: Array, objects: Ints, ground_truth: GroundTruth, taken: Bools) -> Ints:
    """Match one detection per image; of equal overlaps the last object wins.

    Args:
        iou, objects: shape (n, width).
        taken: shape (n, A, thresholds, width); updated in place.

    Returns:
        Index of the object or -1, shape (n, A, thresholds).
    """
    free = ~taken | ground_truth.crowd[objects][:, None, None, :]
    fits = free & (iou[:, None, None, :] >= THRESHOLDS[:, None])
    wanted = fits & ~ground_truth.ignored[objects].swapaxes(1, 2)[:, :, None, :]
    chosen = np.where(wanted.any(axis=-1, keepdims=True), wanted, fits)
    best = np.where(chosen, iou[:, None, None, :], -1.0).argmax(axis=-1)[..., None]
    hit: Bools = np.asarray(chosen.any(axis=-1))
    np.put_along_axis(taken, best, np.take_along_axis(taken, best, axis=-1) | hit[..., None], axis=-1)
    return np.where(hit, np.take_along_axis(objects[:, None, None, :], best, axis=-1)[..., 0], -1)


# COCO's precision-recall curves over any resample of the images.
#
# Average precision is not a function of sums, so the sample keeps every image's part of each curve, and the curves are
# recomputed for each resample: an image that was drawn w times counts w times. Only true positives are visited, because
# precision has its peaks and recall increases only there; the counts before them come from cumulative sums, shared by
# the thresholds of an area range.

RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas in square pixels, both ends included."""

LIMITS = (1, 10, 100)
"""Maximum detections per image and category of AR-1, AR-10 and AR-100, the best first."""

_RECALLS = np.linspace(0.0, 1.0, 101)
_LATE = np.arange(101) / 100 < _RECALLS
"""Recall levels that are above i / 100 in floating point: a recall of exactly i / 100 does not reach them."""
_BLOCK = 1 << 18


@dataclass(frozen=True)
class MatchedDetections:
    """Matches of D detections.

    Attributes:
        keys: category · images + image, ascending; within a key the best score first, shape (D,).
        ranks: place within the key, from 0, shape (D,).
        inside: whether the detection's area is in each area range, shape (D, A).
        hits, counted: true positives; these and false positives, shape (D, A, thresholds).
    """

    keys: Ints
    scores: Array
    ranks: Ints
    inside: Bools
    hits: Bools
    counted: Bools


@dataclass(frozen=True)
class _WeightedCounts:
    """A weighted sum over images."""

    images: Ints
    times: Array

    @classmethod
    def of(cls, images: Ints) -> _WeightedCounts:
        unique, times = np.unique(images, return_counts=True)
        return cls(unique, times.astype(np.float64))

    def sums(self, weights: Array) -> Array:
        """Weights of the images, shape (G, R) → shape (R,)."""
        sums: Array = self.times @ weights[self.images]
        return sums


@dataclass(frozen=True)
class _PRCurve:
    """One precision-recall curve.

    Attributes:
        hits: images of the true positives, by descending score, shape (P,).
        inside: number of detections in the area range up to each of them, shape (P,).
        exceptions, signs: images of detections that count although outside the range (+1), or do not count although
            inside (-1), because of their matched object, shape (E,).
        exceptional: number of exceptions up to each true positive, shape (P,).
    """

    hits: Ints
    inside: Ints
    exceptions: Ints
    signs: Array
    exceptional: Ints


@dataclass(frozen=True)
class _CategoryArea:
    """A category in an area range.

    Attributes:
        ground_truth: the objects to find, by image.
        inside: images of the detections in the area range, by descending score.
        curves: one for each threshold.
        found: limit → objects found, summed over thresholds.
    """

    area: str
    ground_truth: _WeightedCounts
    inside: Ints
    curves: list[_PRCurve]
    found: dict[int, _WeightedCounts]


class DetectionMetric:
    """COCO's metrics with the parts of all images; see `ResampleableMetric`. Weights are whole numbers."""

    def __init__(self, groups: Sequence[Hashable], truth: GroundTruth, matched: MatchedDetections) -> None:
        """
        Args:
            groups: the images' ids, in the order of their numbers in the keys.
        """
        self.groups = list(groups)
        self._category_areas = list(_category_areas(len(groups), truth, matched))

    def values(self, weights: Array) -> dict[str, Array]:
        """See `ResampleableMetric.values`."""
        by_image = np.ascontiguousarray(weights.T)
        sums = {name: np.zeros(len(weights)) for area in RANGES for name in _names(area)}
        categories = {name: np.zeros(len(weights)) for name in sums}
        for category in self._category_areas:
            objects = category.ground_truth.sums(by_image)
            for name, scores in _scores(category, objects, by_image).items():
                sums[name] += scores
                categories[name] += objects > 0
        return {name: divide(total, categories[name]) for name, total in sums.items()}


def _names(area: str) -> list[str]:
    if area == "all":
        return ["AP", "AP50", "AP75", *[f"AR-{limit}" for limit in LIMITS]]
    return [f"AP: {area}", f"AR-{LIMITS[-1]}: {area}"]


def _category_areas(groups: int, truth: GroundTruth, matched: MatchedDetections) -> Iterator[_CategoryArea]:
    """Every category in every area range, where it has objects."""
    categories, images = np.divmod(matched.keys, groups)
    truth_categories, truth_images = np.divmod(truth.keys, groups)
    order = np.lexsort((-matched.scores, categories))  # stable: images in order, as far as scores are equal
    for category in np.unique(truth_categories):
        rows = order[slice(*np.searchsorted(categories, (category, category + 1)))]
        first, end = np.searchsorted(truth_categories, (category, category + 1))
        for area_index, area in enumerate(RANGES):
            wanted = first + np.flatnonzero(~truth.ignored[first:end, area_index])
            if len(wanted):
                yield _category_area(area, _WeightedCounts.of(truth_images[wanted]), images[rows], matched, rows)


def _category_area(
    area: str, objects: _WeightedCounts, images: Ints, matched: MatchedDetections, rows: Ints
) -> _CategoryArea:
    area_index = list(RANGES).index(area)
    inside = matched.inside[rows, area_index]
    hits, counted = matched.hits[rows, area_index], matched.counted[rows, area_index]
    curves = [_curve(images, inside, hits[:, t], counted[:, t]) for t in range(len(THRESHOLDS))]
    ranks = matched.ranks[rows]
    found = {limit: _WeightedCounts.of(images[np.nonzero(hits & (ranks < limit)[:, None])[0]]) for limit in LIMITS}
    return _CategoryArea(area, objects, images[inside], curves, found)


def _curve(images: Ints, inside: Bools, hits: Bools, counted: Bools) -> _PRCurve:
    peaks = np.flatnonzero(hits)
    exceptions = np.flatnonzero(counted != inside)
    signs = np.where(counted[exceptions], 1.0, -1.0)
    return _PRCurve(
        hits=images[peaks],
        inside=np.cumsum(inside, dtype=np.int64)[peaks],
        exceptions=images[exceptions],
        signs=signs,
        exceptional=np.searchsorted(exceptions, peaks, "right"),
    )


def _scores(category: _CategoryArea, objects: Array, by_image: Array) -> dict[str, Array]:
    """A category's scores, shape (R,) each; 0 where it has no objects."""
    objects = np.maximum(objects, 1)
    precision = np.empty((len(THRESHOLDS), len(objects)))
    block = max(1, _BLOCK // (len(category.inside) + 1))
    for start in range(0, len(objects), block):
        columns = slice(start, start + block)
        precision[:, columns] = _precision(category, objects[columns], by_image[:, columns])
    recall = [category.found[limit].sums(by_image) / objects / len(THRESHOLDS) for limit in LIMITS]
    scores = [precision.mean(axis=0), precision[0], precision[5], *recall]
    return dict(zip(_names(category.area), scores if category.area == "all" else [scores[0], scores[-1]], strict=True))


def _precision(category: _CategoryArea, objects: Array, weights: Array) -> Array:
    """Average precision at every threshold.

    Args:
        objects: number of objects to find, shape (R,).
        weights: shape (G, R).

    Returns:
        Shape (thresholds, R).
    """
    inside = _running(weights[category.inside])
    return np.stack([_area_under_curve(curve, inside, objects, weights) for curve in category.curves])


def _area_under_curve(curve: _PRCurve, inside: Array, objects: Array, weights: Array) -> Array:
    """Mean over the recall levels of the best precision at that recall or more."""
    if not len(curve.hits):
        return np.zeros(len(objects))
    found = weights[curve.hits].cumsum(axis=0)
    counted = inside[curve.inside]
    if len(curve.exceptions):
        counted += _running(weights[curve.exceptions] * curve.signs[:, None])[curve.exceptional]
    counted += np.spacing(1)
    precision = found / counted
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    levels = _levels_reached(found, objects)
    levels[1:] -= levels[:-1].copy()
    area: Array = np.einsum("pr,pr->r", best, levels) / len(_RECALLS)
    return area


def _running(values: Array) -> Array:
    """Sums of the first 0, 1, 2 … rows."""
    sums = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=sums[1:])
    return sums


def _levels_reached(found: Array, objects: Array) -> Array:
    """The number of recall levels i · .01 (in floating point) up to found / objects."""
    percent = found * 100 / objects
    levels = np.floor(percent)
    exact = levels == percent
    levels += 1
    levels[exact] -= _LATE[levels[exact].astype(np.int64) - 1]
    return levels
