"""Boxes of referring expressions from JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import UserError
from ftlib.tasks.refer import read_references, score


def jsonl(path: Path, boxes: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps({"id": n, "box": box}) for n, box in enumerate(boxes)))
    return path


def test_score_and_invalid_answers(tmp_path: Path) -> None:
    """Right, exactly half, too small, null, without extent, upside down."""
    references = jsonl(tmp_path / "references.jsonl", [[0, 0, 10, 10]] * 6)
    answers = [[0, 0, 10, 10.5], [0, 0, 5, 10], [0, 0, 4, 10], None, [3, 3, 3, 8], [0, 10, 10, 0]]
    measured = score([references], jsonl(tmp_path / "predictions.jsonl", answers))
    assert measured.rows == [1, 1, 0, 0, 0, 0]
    assert (measured.values(), measured.invalid) == ({"accuracy@.5": pytest.approx(1 / 3)}, 3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    references = jsonl(tmp_path / "references.jsonl", [[0, 0, 10, 10.5]] * 2)
    assert read_references(references)[0].expected == (0, 0, 10, 10.5)
    predictions = jsonl(tmp_path / "predictions.jsonl", [[0, 0, 10, 10.5], None])
    assert score([references], predictions).rows == [1, 0]


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], [1, 2, 3, float("inf")], {}, "box", 5])
def test_wrong_boxes(tmp_path: Path, box: Any) -> None:
    good = jsonl(tmp_path / "good.jsonl", [[0, 0, 1, 1], [0, 0, 1, 1]])
    wrong = jsonl(tmp_path / "wrong.jsonl", [[0, 0, 1, 1], box])
    for references, predictions in ((good, wrong), (wrong, good)):
        with pytest.raises(UserError, match=r"wrong\.jsonl: (id 1|record 2): field box"):
            score([references], predictions)


@pytest.mark.parametrize("box", [[1, 2, 1, 5], [4, 2, 3, 5], [1, 2, 3, 2], None])
def test_a_reference_must_have_extent(tmp_path: Path, box: Any) -> None:
    with pytest.raises(UserError, match="field box"):
        read_references(jsonl(tmp_path / "references.jsonl", [box]))
