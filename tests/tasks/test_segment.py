"""Masks of referring expressions from JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from ftlib.errors import UserError
from ftlib.metrics.segmentation import from_pixels
from ftlib.tasks.segment import read_references, score

PIXELS = np.zeros((6, 8), dtype=np.uint8)
PIXELS[1:5, 2:6] = 1
COMPRESSED = {"size": [6, 8], "counts": mask.encode(np.asfortranarray(PIXELS))["counts"].decode()}
RUNS = {"size": [6, 8], "counts": [13, 4, 2, 4, 2, 4, 2, 4, 13]}
POLYGONS = {"size": [6, 8], "polygons": [[2, 1, 6, 1, 6, 5, 2, 5]]}
HALF = {"size": [6, 8], "polygons": [[2, 1, 6, 1, 6, 3, 2, 3]]}


def jsonl(path: Path, masks: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps({"id": n, "mask": one, "image": "x"}) for n, one in enumerate(masks)))
    return path


def test_all_forms_are_the_same_mask(tmp_path: Path) -> None:
    rows = read_references(jsonl(tmp_path / "references.jsonl", [COMPRESSED, RUNS, POLYGONS]))
    assert [row.expected for row in rows] == [from_pixels(PIXELS)] * 3


def test_score_and_invalid_answers(tmp_path: Path) -> None:
    references = jsonl(tmp_path / "references.jsonl", [COMPRESSED, RUNS, POLYGONS])
    measured = score([references], jsonl(tmp_path / "predictions.jsonl", [RUNS, HALF, None]))
    assert measured.rows == [1, 0.5, 0]
    values = measured.values()
    assert (values["mIoU"], values["cIoU"], measured.invalid) == (pytest.approx(0.5), pytest.approx(24 / 48), 1)
    assert len(measured.sample.groups) == 1


def test_what_is_written_is_read(tmp_path: Path) -> None:
    references = jsonl(tmp_path / "references.jsonl", [COMPRESSED, RUNS])
    predictions = jsonl(tmp_path / "predictions.jsonl", [COMPRESSED, None])
    assert score([references], predictions).rows == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        7,
        [1, 2],
        {"size": [6, 8]},
        {"size": [6], "counts": [48]},
        {"size": [6, -8], "counts": [48]},
        {"size": [6, 8], "counts": [47]},
        {"size": [6, 8], "counts": [50, -2]},
        {"size": [6, 8], "counts": "zz"},
        {"size": [6, 8], "counts": None},
        {"size": [6, 8], "polygons": []},
        {"size": [6, 8], "polygons": [[1, 2, 3]]},
        {"size": [6, 8], "polygons": ["no"]},
    ],
)
def test_wrong_masks(tmp_path: Path, wrong: Any) -> None:
    good = jsonl(tmp_path / "good.jsonl", [RUNS, RUNS])
    bad = jsonl(tmp_path / "bad.jsonl", [RUNS, wrong])
    for references, predictions in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match=r"bad\.jsonl: (id 1|record 2): "):
            score([references], predictions)


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    references = jsonl(tmp_path / "references.jsonl", [RUNS])
    predictions = jsonl(tmp_path / "predictions.jsonl", [{"size": [8, 6], "counts": [48]}])
    with pytest.raises(UserError, match=r"predictions\.jsonl: id 0: the mask has 8 × 6 pixels, the reference 6 × 8"):
        score([references], predictions)


def test_an_empty_reference(tmp_path: Path) -> None:
    for empty in (None, {"size": [6, 8], "counts": [48]}):
        with pytest.raises(UserError, match="mask"):
            read_references(jsonl(tmp_path / "references.jsonl", [empty]))
