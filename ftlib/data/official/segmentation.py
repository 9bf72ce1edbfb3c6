"""Masks of referring expressions from JSONL: `{"id", "mask": …}` in both files.

A mask is `{"size": [height, width], "counts": …}` with COCO's run lengths, compressed (text) or not (numbers), or
`{"size": [height, width], "polygons": [[x, y, x, y, …], …]}`. References may name their `image`. A prediction of null
is no mask: its IoU is 0, and it is counted as invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.data.examples import raise_faults
from ftlib.data.official.rows import Row, only, read_answers, read_rows
from ftlib.metrics import masks
from ftlib.metrics.masks import Mask, from_polygons, from_run_lengths
from ftlib.metrics.totals import Measured


def read_references(path: Path) -> list[Row[Mask]]:
    """Read the masks that are asked for.

    Raises:
        UserError: the file is malformed, ids occur twice, a mask is empty.
    """
    return read_rows(path, {"mask": dict}, _expected)


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """Mean and cumulative IoU.

    Args:
        references: one JSONL file.

    Raises:
        UserError: malformed files, not the same ids in both, masks of different size for one id.
    """
    rows = read_references(only(references, "segment"))
    answers = read_answers(predictions, {"mask": (dict, type(None))}, _answered, rows)
    _require_same_sizes(predictions, rows, answers)
    return masks.measure(answers, [row.expected for row in rows], [row.group for row in rows])


def _require_same_sizes(path: Path, rows: Sequence[Row[Mask]], answers: Sequence[Mask | None]) -> None:
    faults = []
    for row, found in zip(rows, answers, strict=True):
        wanted = (row.expected.height, row.expected.width)
        if found and (found.height, found.width) != wanted:
            sizes = f"the mask is of {found.height} × {found.width} pixels, the reference of {wanted[0]} × {wanted[1]}"
            faults.append(f"{path}: id {row.id}: {sizes}")
    raise_faults(faults, "Masks must be of the image's own size (height, width).")


def _expected(record: dict[str, Any]) -> Mask:
    mask = _answered(record)
    if mask is None or not mask.area:
        raise ValueError("field mask: is empty")
    return mask


def _answered(record: dict[str, Any]) -> Mask | None:
    return None if record["mask"] is None else read_mask(record["mask"])


def read_mask(value: dict[str, Any]) -> Mask:
    """A mask as it is written in JSON (see above).

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


def write_mask(mask: Mask) -> dict[str, Any]:
    """A mask as JSON, with compressed run lengths."""
    return {"size": [mask.height, mask.width], "counts": mask.counts.decode()}
