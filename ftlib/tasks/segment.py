"""Masks of referring expressions. JSONL of references and predictions: `{"id", "mask": …}`.

A mask is `{"size": [height, width], "counts": …}` with COCO's run lengths, compressed (text) or not (numbers), or
`{"size": [height, width], "polygons": [[x, y, x, y, …], …]}`. References may have `image`. A prediction of null has an
IoU of 0 and counts as invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.core.registry import register_task
from ftlib.data.example import Example, raise_all
from ftlib.data.location_tokens import parse_objects
from ftlib.data.sources.records import Reference, read_predictions, read_reference_rows, shown_id, single_file
from ftlib.errors import UserError
from ftlib.metrics import segmentation
from ftlib.metrics.base import MetricResult
from ftlib.metrics.segmentation import Mask, read_mask
from ftlib.tasks.base import PredictionRecord, Task
from ftlib.tasks.located import images_of, row_facts, validate_image_size


def read_references(path: Path) -> list[Reference[Mask]]:
    """Read the expected masks.

    Raises:
        UserError: the file is malformed, ids are not unique, a mask is empty.
    """
    return read_reference_rows(path, {"mask": dict}, _expected)


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return mean and cumulative IoU.

    Args:
        references: one JSONL file.

    Raises:
        UserError: malformed files, different ids in both, masks of different sizes for one id.
    """
    rows = read_references(single_file(references, "segment"))
    answers = read_predictions(predictions, {"mask": (dict, type(None))}, _answered, rows)
    _require_same_sizes(predictions, rows, answers)
    return segmentation.measure(answers, [row.expected for row in rows], [row.group for row in rows])


def _require_same_sizes(path: Path, rows: Sequence[Reference[Mask]], answers: Sequence[Mask | None]) -> None:
    faults = []
    for row, found in zip(rows, answers, strict=True):
        wanted = (row.expected.height, row.expected.width)
        if found and (found.height, found.width) != wanted:
            sizes = f"the mask has {found.height} × {found.width} pixels, the reference {wanted[0]} × {wanted[1]}"
            faults.append(f"{path}: id {shown_id(row.id)}: {sizes}")
    raise_all(faults, "Masks must have the size of the image (height, width).")


def _expected(record: dict[str, Any]) -> Mask:
    mask = _answered(record)
    if mask is None or not mask.area:
        raise ValueError("field mask: is empty")
    return mask


def _answered(record: dict[str, Any]) -> Mask | None:
    return None if record["mask"] is None else read_mask(record["mask"])


def validate_segment_target(row: Example) -> str:
    """Check that the answer is one object with mask codes, and that the row has the mask itself for scoring."""
    parsed = parse_objects(row.suffix)
    if parsed.unreadable or [bool(one.mask) for one in parsed.objects] != [True]:
        return (
            "field suffix: must be four <locYYYY> and sixteen <segXXX> tokens (evaluation.mask_decoder makes them "
            f"from field mask), got {row.suffix!r}"
        )[:400]
    mask = row.facts.get("mask")
    if not isinstance(mask, dict):
        return 'field mask: must be {"size": [height, width], "polygons": …, or "counts": …}'
    try:
        read_mask(mask)
    except ValueError as error:
        return str(error)
    return ""


def _segment(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    return score_masks(records)


@register_task(name="segment")
def make_task() -> Task:
    return Task(
        score=_segment,
        validate_target=validate_segment_target,
        validate_image_size=validate_image_size,
    )


def score_masks(records: Sequence[PredictionRecord]) -> MetricResult:
    """Return mean and cumulative IoU of the rows' `mask` (decoded from the answer's codes; null if it has none).

    Raises:
        UserError: a row lacks its expected mask, or an answer's codes were not decoded.
    """
    answered = []
    for record in records:
        if "mask" not in record:
            raise UserError(f"row {record['id']}: the answer's mask was not decoded", "Set evaluation.mask_decoder.")
        answered.append(None if record["mask"] is None else read_mask(record["mask"]))
    return segmentation.measure(answered, [expected_mask(record) for record in records], images_of(records))


def expected_mask(record: PredictionRecord) -> Mask:
    """Return the expected mask of a row of `segment`.

    Raises:
        UserError: the row has none.
    """
    try:
        return read_mask(row_facts(record)["mask"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        remedy = 'Rows of task segment need the mask itself: {"size": [height, width], "polygons": …, or "counts": …}.'
        reason = "field mask is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"row {record['id']}: {reason}", remedy) from None
