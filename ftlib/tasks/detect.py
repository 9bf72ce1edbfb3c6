"""Detection: generated boxes, ranked by the probabilities of their tokens, scored by COCO's average precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from ftlib.core.registry import register_task
from ftlib.data.example import Example
from ftlib.data.json_boxes import answer_errors, box_syntax, json_object_spans, parse_answer
from ftlib.data.location_tokens import ParsedObjects, object_spans, to_pixels
from ftlib.errors import UserError
from ftlib.metrics import coco_ap
from ftlib.metrics.base import Array, MetricResult, ResampleableMetric
from ftlib.metrics.coco_ap import RANGES, THRESHOLDS, Box, Detection, GroundTruthObject, overlaps
from ftlib.tasks.base import PredictionRecord, Task, official_id
from ftlib.tasks.located import as_record, box_facts_fault, is_box, require, row_facts, size_of, validate_image_size

SCORED = "ranked by token probability"
"""The score of a box: the probability of its label, times the geometric mean of its location tokens' probabilities."""

RANKED = "ranked by order of mention"
"""Without probabilities (evaluations by older versions) boxes get scores by their order in the answer: 1, 1/2, …"""

BY_MENTION = "order of mention: "
"""Prefix of metrics with the second ranking, beside the first."""


@dataclass(frozen=True)
class _ImageObjects:
    """A row of `detect`.

    Attributes:
        size: width and height in pixels; (1, 1) if unknown.
        objects: ground truth: label, box (x_min, y_min, x_max, y_max in pixels), area in square pixels, crowd.
        answer: the model's objects.
        scores: of each of these.
    """

    image: int
    size: tuple[float, float]
    objects: list[tuple[str, Box, float, bool]]
    answer: ParsedObjects
    scores: list[float]


def box_scores(text: str, ends: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
    """Return the field `box_scores`: a score between 0 and 1 for each object of a generated answer.

    It is the probability of the label, times the geometric mean of the probabilities of the location tokens (in JSON:
    of the tokens of the four numbers). Pix2Seq (Chen et al., ICLR 2022) ranks by the probability of the class token
    alone.

    Args:
        ends: where each token ends in the text, in characters.
        logprobs: of each token.

    Returns:
        Empty if the tokens do not make up the text, so that nothing is known of its objects.
    """
    if not ends or ends[-1] != len(text):
        return {}
    spans = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def chosen(part: range) -> list[float]:
        return [
            number
            for span, number in zip(spans, logprobs, strict=True)
            if max(span.start, part.start) < min(span.stop, part.stop)
        ]

    scores = []
    for location, label in object_spans(text) or json_object_spans(text):
        numbers = chosen(location)
        scores.append(round(math.exp(sum(numbers) / len(numbers) + sum(chosen(label))), 9))
    return {"box_scores": scores}


def score_detections(records: Sequence[PredictionRecord]) -> MetricResult:
    """Return COCO's average precision of generated boxes. Rows of one image are scored together.

    An answer with an invalid fragment, or with a label that no expected answer of the split has, is invalid; its other
    boxes count. Boxes are ranked by `box_scores` if all answers have them, and AP, AP50 and AP75 are added with the
    ranking by order of mention; without scores there is only the latter. The score of a single row, which COCO does
    not define, is the F1 of its boxes at an IoU of 0.5.

    Raises:
        UserError: expected answers are not boxes.
    """
    all_objects = _image_objects(records)
    labels = _labels(all_objects)
    objects = [(image_objects.image, *one) for image_objects in all_objects for one in image_objects.objects]
    truth = [
        GroundTruthObject(number, image, labels[label], _xyxy_to_xywh(box), area, crowd)
        for number, (image, label, box, area, crowd) in enumerate(objects, 1)
    ]
    images = sorted({image_objects.image for image_objects in all_objects})
    by_mention = [replace(one, scores=_scores_by_mention(one.answer)) for one in all_objects]
    measured = coco_ap.average_precision(images, truth, _all_detections(by_mention, labels))
    ranking = RANKED
    if _are_scored(records, all_objects):
        plain = measured.sample
        measured = coco_ap.average_precision(images, truth, _all_detections(all_objects, labels))
        measured = replace(measured, sample=_BothRankings(measured.sample, plain))
        ranking = SCORED
    unknown = [
        [one.label for one in image_objects.answer.objects if one.label not in labels] for image_objects in all_objects
    ]
    measured = replace(
        measured,
        rule=f"{measured.rule}, {ranking}",
        rows=[_f1(image_objects) for image_objects in all_objects],
        invalid=sum(
            bool(image_objects.answer.unreadable or names)
            for image_objects, names in zip(all_objects, unknown, strict=True)
        ),
        tables={
            "unreadable fragments": sum(image_objects.answer.unreadable for image_objects in all_objects),
            "unknown labels": dict(Counter(chain.from_iterable(unknown)).most_common()),
        },
    )
    return measured if _all_sized(records) else _without_areas(measured)


def detection_results(records: Sequence[PredictionRecord]) -> list[dict[str, Any]] | None:
    """Return COCO's result file; None if the rows lack the sizes of their images.

    Without `category_id` in the rows' objects, categories are numbered from 1 in the order of their labels.
    """
    if not _all_sized(records):
        return None
    all_objects = _image_objects(records)
    if not _are_scored(records, all_objects):
        all_objects = [replace(one, scores=_scores_by_mention(one.answer)) for one in all_objects]
    labels = _labels(all_objects)
    listed = [one for record in records for one in row_facts(record).get("objects", [])]
    official = {one["label"]: one["category_id"] for one in listed if "category_id" in one}
    numbers = official if set(labels) <= set(official) else {label: n + 1 for label, n in labels.items()}
    names = list(labels)
    results = []
    for record, image_objects in zip(records, all_objects, strict=True):
        image = row_facts(record).get("image_id", record["id"])
        for one in _detections(image_objects, labels):
            identity = {"image_id": official_id(image), "category_id": numbers[names[int(one.category)]]}
            results.append({**identity, "bbox": [round(edge, 3) for edge in one.box], "score": one.score})
    return results


def _image_objects(records: Sequence[PredictionRecord]) -> list[_ImageObjects]:
    places: dict[Any, int] = {}
    all_objects = []
    for record in records:
        size = size_of(record) or (1.0, 1.0)
        objects = listed_objects(record) if "objects" in row_facts(record) else _read(record, size)
        image = places.setdefault(record["image"], len(places))
        answer = parse_answer(record["prediction"], row_facts(record))
        scores = record.get("box_scores", []) if answer.objects else []  # of objects in another form
        all_objects.append(_ImageObjects(image, size, objects, answer, scores))
    return all_objects


def _are_scored(records: Sequence[PredictionRecord], all_objects: Sequence[_ImageObjects]) -> bool:
    """Whether every answer has a score for each of its boxes."""
    return all("box_scores" in record for record in records) and all(
        len(one.scores) == len(one.answer.objects) for one in all_objects
    )


def _scores_by_mention(answer: ParsedObjects) -> list[float]:
    return [1 / rank for rank in range(1, len(answer.objects) + 1)]


def _labels(all_objects: Sequence[_ImageObjects]) -> dict[str, int]:
    """Return label → number, in sorted order."""
    return {
        label: number
        for number, label in enumerate(
            sorted({one[0] for image_objects in all_objects for one in image_objects.objects})
        )
    }


def listed_objects(record: PredictionRecord) -> list[tuple[str, Box, float, bool]]:
    """Return the objects in a row's facts: label, box (x_min, y_min, x_max, y_max), area in pixels, crowd.

    Raises:
        UserError: the facts are invalid.
    """
    objects = row_facts(record)["objects"]
    require(isinstance(objects, list) and size_of(record), record, "a list of objects, width and height")
    found = []
    for one in objects:
        right = isinstance(one, dict) and isinstance(one.get("label"), str) and is_box(one.get("box"))
        require(right, record, 'objects with a "label" and a "box" [x_min, y_min, x_max, y_max]')
        box = one["box"]
        area = one.get("area", (box[2] - box[0]) * (box[3] - box[1]))
        require(type(area) in (int, float) and area >= 0, record, "objects whose area is a number of square pixels")
        found.append((one["label"], tuple(box), float(area), bool(one.get("crowd", False))))
    return found


def _read(record: PredictionRecord, size: tuple[float, float]) -> list[tuple[str, Box, float, bool]]:
    """Return the objects in the expected answer."""
    parsed = parse_answer(record["references"][0], row_facts(record))
    syntax = box_syntax(row_facts(record))
    require(not parsed.unreadable, record, f"an expected answer of boxes ({syntax} and a label)")
    found = [(one.label, to_pixels(one.box, *size)) for one in parsed.objects]
    return [(label, box, (box[2] - box[0]) * (box[3] - box[1]), False) for label, box in found]


def _all_detections(all_objects: Sequence[_ImageObjects], labels: Mapping[str, int]) -> list[Detection]:
    return [one for image_objects in all_objects for one in _detections(image_objects, labels)]


def _detections(image_objects: _ImageObjects, labels: Mapping[str, int]) -> list[Detection]:
    """Return the model's objects with known labels."""
    return [
        Detection(image_objects.image, labels[one.label], _xyxy_to_xywh(to_pixels(one.box, *image_objects.size)), score)
        for one, score in zip(image_objects.answer.objects, image_objects.scores, strict=True)
        if one.label in labels
    ]


@dataclass(frozen=True)
class _BothRankings:
    """AP with boxes ranked by their scores, and by the order of mention with the prefix `BY_MENTION`."""

    scored: ResampleableMetric
    by_mention: ResampleableMetric

    @property
    def groups(self) -> Sequence[Hashable]:
        return self.scored.groups

    def values(self, weights: Array) -> dict[str, Array]:
        """See `ResampleableMetric.values`."""
        second = self.by_mention.values(weights)
        return self.scored.values(weights) | {f"{BY_MENTION}{name}": second[name] for name in ("AP", "AP50", "AP75")}


def _f1(image_objects: _ImageObjects) -> float:
    """Return the F1 of one row: each box is matched to at most one object of its label, the one with the highest
    IoU."""
    free = [(label, box) for label, box, _, crowd in image_objects.objects if not crowd]
    total = len(free) + len(image_objects.answer.objects) + image_objects.answer.unreadable
    hits = 0
    for one in image_objects.answer.objects:
        alike = [place for place, (label, _) in enumerate(free) if label == one.label]
        found = np.array([_xyxy_to_xywh(to_pixels(one.box, *image_objects.size))] * len(alike)).reshape(-1, 4)
        shares = overlaps(found, np.array([_xyxy_to_xywh(free[place][1]) for place in alike]).reshape(-1, 4))
        if len(shares) and shares.max() >= THRESHOLDS[0]:
            free.pop(alike[int(shares.argmax())])
            hits += 1
    return 2 * hits / total if total else 1.0


def _without_areas(measured: MetricResult) -> MetricResult:
    """Remove the metrics by size, which are defined in pixels."""
    names = [name for name in measured.values() if name.split(": ")[-1] in RANGES]
    notes = dict.fromkeys(names, "the rows lack their images' width and height")
    return replace(measured, sample=_MetricSubset(measured.sample, frozenset(names)), notes=notes)


@dataclass(frozen=True)
class _MetricSubset:
    """A resampleable metric without some of its values."""

    whole: ResampleableMetric
    left_out: frozenset[str]

    @property
    def groups(self) -> Sequence[Hashable]:
        return self.whole.groups

    def values(self, weights: Array) -> dict[str, Array]:
        return {name: value for name, value in self.whole.values(weights).items() if name not in self.left_out}


def _all_sized(records: Sequence[PredictionRecord]) -> bool:
    return all(size_of(record) for record in records)


def _xyxy_to_xywh(box: Box) -> Box:
    """Convert x_min, y_min, x_max, y_max to x, y, width, height."""
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def validate_detect_target(row: Example) -> str:
    """Check that the answer is a list of boxes with labels that match the field `objects`, if there is one."""
    wrong = answer_errors(row.suffix, row.facts)
    parsed = parse_answer(row.suffix, row.facts)
    if not wrong:
        wrong = [f"object {n}: no label after its box" for n, one in enumerate(parsed.objects, 1) if not one.label]
    if wrong:
        needed = f"each object needs {box_syntax(row.facts)} and a label"
        return f"field suffix: {wrong[0]}; {needed}, got {row.suffix!r}"[:300]
    if "objects" not in row.facts:
        return ""
    try:
        known = listed_objects(as_record(row))
    except UserError as error:
        return f"field objects: {error.problem.removeprefix(f'row {row.id}: ')}"[:300]
    boxes = [(label, box) for label, box, *_ in known]
    return box_facts_fault(row, "objects", boxes, [(one.label, one.box) for one in parsed.objects])


def _detect(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    return score_detections(records)


@register_task(name="detect")
def make_task() -> Task:
    return Task(
        score=_detect,
        submission=detection_results,
        answer_fields=box_scores,
        validate_target=validate_detect_target,
        validate_image_size=validate_image_size,
    )
