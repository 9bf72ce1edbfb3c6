"""Detection metrics against pycocotools; boxes of referring expressions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ftlib.metrics.coco_ap import Box, Detection, GroundTruthObject, accuracy, average_precision
from ftlib.metrics.uncertainty import confidence_intervals, paired_test

NAMES = ["AP", "AP50", "AP75", "AP: small", "AP: medium", "AP: large", "AR-1", "AR-10", "AR-100"]
NAMES += ["AR-100: small", "AR-100: medium", "AR-100: large"]
"""In the order of COCOeval's `stats`."""


def pycocotools_scores(
    images: list[int], objects: list[GroundTruthObject], detections: list[Detection], categories: list[int]
) -> dict[str, float]:
    """What COCOeval finds; NaN where it says -1."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": category} for category in categories],
        "annotations": [
            {"id": o.id, "image_id": o.image, "category_id": o.category, "bbox": list(o.box), "area": o.area,
             "iscrowd": int(o.crowd)} for o in objects
        ],
    }  # fmt: skip
    truth.createIndex()
    results: list[dict[str, Any]] = [
        {"image_id": d.image, "category_id": d.category, "bbox": list(d.box), "score": d.score} for d in detections
    ]
    judged = COCOeval(truth, truth.loadRes(results), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return {name: value if value > -1 else np.nan for name, value in zip(NAMES, judged.stats, strict=True)}


def random_set(
    draw: random.Random, images: int = 12, distinct_scores: bool = False, crowds: float = 0.15, most: int = 8
) -> tuple[list[int], list[GroundTruthObject], list[Detection]]:
    """Images, objects and detections of all kinds; category 4 has no objects, 5 no detections, some images nothing."""
    ids = draw.sample(range(1, 10 * images), images)
    objects: list[GroundTruthObject] = []
    detections: list[Detection] = []
    numbers = draw.sample(range(1, 10_000), images * most * 2)
    for image in ids:
        for _ in range(draw.choice([0, 1, 2, most])):
            size = draw.choice([12, 40, 150])
            box = (draw.uniform(0, 200), draw.uniform(0, 200), draw.uniform(2, size), draw.uniform(2, size))
            area = box[2] * box[3] * draw.choice([1, 1, 0.5])
            crowd = draw.random() < crowds
            objects.append(GroundTruthObject(numbers.pop(), image, draw.choice([1, 2, 3, 5]), box, area, crowd))
            for _ in range(draw.choice([0, 1, 1, 3])):
                moved = tuple(value * draw.uniform(0.8, 1.2) if draw.random() < 0.7 else value for value in box)
                kind = objects[-1].category if draw.random() < 0.8 else draw.choice([1, 2, 3, 4])
                if kind != 5:
                    detections.append(Detection(image, kind, moved, draw.choice([0.9, 0.5, draw.random()])))
        for _ in range(draw.choice([0, 0, 3])):
            box = (draw.uniform(0, 200), draw.uniform(0, 200), draw.uniform(2, 200), draw.uniform(2, 200))
            detections.append(Detection(image, draw.choice([1, 2, 3, 4]), box, draw.random()))
    draw.shuffle(detections)
    if distinct_scores:
        detections = [Detection(d.image, d.category, d.box, (n + 1) / 1e4) for n, d in enumerate(detections)]
    return ids, objects, detections


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_pycocotools(seed: int) -> None:
    ids, objects, detections = random_set(random.Random(seed), images=10 + seed)
    ours = average_precision(ids, objects, detections).values()
    theirs = pycocotools_scores(ids, objects, detections, [1, 2, 3, 4, 5])
    assert {name: ours[name] for name in NAMES} == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert set(ours) == set(NAMES)


def same_as_pycocotools(ids: list[int], objects: list[GroundTruthObject], detections: list[Detection]) -> None:
    categories = sorted({one.category for one in [*objects, *detections]})
    theirs = pycocotools_scores(ids, objects, detections, categories)
    assert average_precision(ids, objects, detections).values() == pytest.approx(theirs, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", range(5))
def test_many_crowds(seed: int) -> None:
    same_as_pycocotools(*random_set(random.Random(seed), images=20, crowds=0.6))


@pytest.mark.parametrize("seed", range(10))
def test_equal_overlaps_on_a_grid(seed: int) -> None:
    """Boxes of whole pixels: equal overlaps, overlaps of exactly .5, objects upon each other."""
    draw = random.Random(seed)

    def box() -> Box:
        return (
            draw.randrange(3) * 10.0,
            draw.randrange(3) * 10.0,
            draw.choice([10.0, 20.0]),
            draw.choice([10.0, 20.0]),
        )

    places = [(image, box()) for image in range(1, 9) for _ in range(6)]
    objects = [
        GroundTruthObject(n + 1, image, 1, box, draw.choice([100, 32**2, 96**2, 1e10]), draw.random() < 0.2)
        for n, (image, box) in enumerate(places)
    ]
    found = [Detection(image, 1, box(), draw.choice([0.1, 0.2])) for image in range(1, 9) for _ in range(12)]
    same_as_pycocotools(list(range(1, 9)), objects, found)


def test_no_more_than_100_detections_of_an_image_and_category() -> None:
    draw = random.Random(0)
    objects = [GroundTruthObject(n + 1, 1, 1, (20.0 * n, 0.0, 20.0, 20.0), 400.0) for n in range(130)]
    found = [Detection(1, 1, one.box, draw.random()) for one in objects]
    found += [Detection(1, 1, (0.0, 500.0, 9.0, 9.0), -draw.random()) for _ in range(30)]
    same_as_pycocotools([1, 2], objects, found)


@pytest.mark.parametrize("count", [7, 25, 50, 100])
def test_recall_exactly_on_a_level(count: int) -> None:
    """.28 is reached by 7 of 25 and yet lies below 28 · .01 in floating point."""
    objects = [GroundTruthObject(n + 1, n, 1, (0.0, 0.0, 9.0, 9.0), 81.0) for n in range(count)]
    found = [Detection(n, 1, (0.0, 0.0, 9.0, 9.0), 1 - n / count) for n in range(count)]
    wrong = [Detection(n, 1, (50.0, 0.0, 9.0, 9.0), 1 - n / count - 1e-4) for n in range(count)]
    same_as_pycocotools(list(range(count)), objects, found[: count * 4 // 5] + wrong)


def test_an_object_with_id_0_is_never_found() -> None:
    box = (0.0, 0.0, 40.0, 40.0)
    objects = [
        GroundTruthObject(0, 1, 1, box, 1600.0),
        GroundTruthObject(1, 2, 1, box, 1600.0),
        GroundTruthObject(2, 2, 1, (90.0, 0.0, 9.0, 9.0), 81.0),
    ]
    same_as_pycocotools([1, 2], objects, [Detection(image, 1, box, image / 3) for image in (1, 2)])


def test_nothing_detected_and_nothing_to_detect() -> None:
    nothing = average_precision([1, 2], [GroundTruthObject(1, 1, 1, (0, 0, 9, 9), 81)], []).values()
    assert (nothing["AP"], nothing["AR-100"], nothing["AP: small"]) == (0, 0, 0)
    assert np.isnan(nothing["AP: large"])
    assert all(np.isnan(v) for v in average_precision([1], [], [Detection(1, 1, (0, 0, 9, 9), 0.5)]).values().values())


@pytest.mark.parametrize("seed", range(8))
def test_a_weight_is_a_number_of_copies(seed: int) -> None:
    """Weights of whole numbers against pycocotools on copied images; a copy's id follows its original's."""
    draw = random.Random(seed)
    ids, objects, detections = random_set(draw, images=15, distinct_scores=True)
    weights = {image: draw.choice([0, 0, 1, 1, 2, 3]) for image in ids}
    copies = {image: [10 * image + copy for copy in range(weights[image])] for image in ids}
    copied = [(image, one) for one in objects for image in copies[one.image]]
    more = [GroundTruthObject(n + 1, image, o.category, o.box, o.area, o.crowd) for n, (image, o) in enumerate(copied)]
    found = [Detection(image, d.category, d.box, d.score) for d in detections for image in copies[d.image]]
    sample = average_precision(ids, objects, detections).sample
    rows = np.array([[weights[image] for image in sample.groups], [1] * len(ids)], dtype=float)  # type: ignore[index]
    values = sample.values(rows)
    theirs = pycocotools_scores([one for own in copies.values() for one in own], more, found, [1, 2, 3, 4, 5])
    assert {name: values[name][0] for name in NAMES} == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    plain = average_precision(ids, objects, detections).values()
    assert {name: values[name][1] for name in NAMES} == pytest.approx(plain, nan_ok=True)


def test_many_weights_at_once_are_each_for_themselves() -> None:
    ids, objects, detections = random_set(random.Random(3), images=40)
    sample = average_precision(ids, objects, detections).sample
    weights = np.random.default_rng(0).integers(0, 4, size=(50, len(ids))).astype(float)
    together = sample.values(weights)
    for row in range(0, 50, 7):
        alone = sample.values(weights[row : row + 1])
        assert {n: together[n][row] for n in NAMES} == pytest.approx({n: alone[n][0] for n in NAMES}, nan_ok=True)


def test_interval_and_comparison() -> None:
    ids, objects, detections = random_set(random.Random(1), images=40)
    good, bad = (average_precision(ids, objects, found) for found in (detections, detections[::5]))
    found = confidence_intervals(good)["AP"]
    assert found and found[0] < good.values()["AP"] < found[1]
    compared = paired_test(good.sample, bad.sample, "AP")
    assert compared.difference == pytest.approx(bad.values()["AP"] - good.values()["AP"])
    assert compared.difference < 0 and compared.p < 0.05


def literal_iou(a: Box, b: Box) -> float:
    """Of boxes of whole pixels, by counting them."""

    def pixels(box: Box) -> set[tuple[int, int]]:
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    return len(pixels(a) & pixels(b)) / max(1, len(pixels(a) | pixels(b)))


def test_accuracy_of_referring_expressions() -> None:
    draw = random.Random(0)

    def box() -> Box:
        x, y = draw.randrange(4), draw.randrange(4)
        return (x, y, x + draw.randrange(1, 5), y + draw.randrange(1, 5))

    asked = [box() for _ in range(300)]
    answered = [draw.choice([box(), box(), one, None]) for one in asked]
    measured = accuracy(answered, asked, groups=[n // 3 for n in range(300)])
    expected = [float(a is not None and literal_iou(a, b) >= 0.5) for a, b in zip(answered, asked, strict=True)]
    assert measured.rows == expected
    assert measured.values() == pytest.approx({"accuracy@.5": sum(expected) / 300})
    assert measured.invalid == answered.count(None)
    assert len(measured.sample.groups) == 100


def test_an_overlap_of_exactly_half_counts() -> None:
    assert accuracy([(0, 0, 10, 5)], [(0, 0, 10, 10)]).values() == {"accuracy@.5": 1}
    assert accuracy([(0, 0, 10, 4.99)], [(0, 0, 10, 10)]).values() == {"accuracy@.5": 0}
