"""Result files scored without a run: what `ftlib score` tells about the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.metrics.answers import LENGTH, STOP
from ftlib.tasks.score_files import score_files

LOOP = "a dog " * 8


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(folder: Path, answers: list[str], expected: list[str], **more: Any) -> tuple[list[Path], Path]:
    """References and predictions in JSONL; `more` are fields of every prediction."""
    asked = [{"id": number, "references": [text]} for number, text in enumerate(expected)]
    told = [{"id": number, "prediction": text, **more} for number, text in enumerate(answers)]
    return [lines(folder / "references.jsonl", asked)], lines(folder / "predictions.jsonl", told)


def captions(folder: Path, answers: list[str]) -> tuple[list[Path], Path]:
    ids = range(len(answers))
    release = {
        "images": [{"id": one, "file_name": f"{one}.png"} for one in ids],
        "annotations": [{"id": one, "image_id": one, "caption": f"dog number {one} runs"} for one in ids],
    }
    (folder / "captions.json").write_text(json.dumps(release), encoding="utf-8")
    results = [{"image_id": one, "caption": text} for one, text in enumerate(answers)]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return [folder / "captions.json"], folder / "results.json"


@pytest.mark.parametrize("task", ["text", "classify", "caption"])
def test_empty_and_repeated_answers_are_counted(task: str, tmp_path: Path) -> None:
    answers = ["", "a dog runs", LOOP, " "]
    files = captions(tmp_path, answers) if task == "caption" else pair(tmp_path, answers, ["a dog runs"] * 4)
    scores = score_files(task, *files)
    assert scores["answers"] == {"cut_off": None, "empty": 2, "repeated": 1, "almost_labels": 0}
    assert "2 of 4 answers are empty." in scores["remarks"]
    assert "1 of 4 answers repeat the same text at their end." in scores["remarks"]


def test_predictions_of_ftlib_tell_what_was_cut_off(tmp_path: Path) -> None:
    files = pair(tmp_path, ["a dog", "a cat"], ["a dog", "a cat"], finish_reason=LENGTH)
    scores = score_files("text", *files)
    assert scores["answers"]["cut_off"] == 2
    assert any(remark.startswith("2 of 2 answers were cut off") for remark in scores["remarks"])
    assert score_files("text", *pair(tmp_path, ["a dog"], ["a dog"], finish_reason=STOP))["answers"]["cut_off"] == 0


def test_labels_but_for_case_are_told(tmp_path: Path) -> None:
    scores = score_files("classify", *pair(tmp_path, ["Dog.", "cat"], ["dog", "cat"]))
    assert scores["answers"]["almost_labels"] == 1 and scores["invalid"] == 1
    assert any("labels but for case or a full stop" in remark for remark in scores["remarks"])


@pytest.mark.parametrize(
    ("answer", "expected", "remark"),
    [
        ("Question: where? Answer: Paris", "Paris", "2 of 2 answers contain a reference among other words"),
        ("cafe\u0301", "caf\u00e9", "2 of 2 answers are written with other Unicode characters"),
        ("3.0", "3", "BLEU is 0 because"),
        ("Parisian", "Paris", ""),
    ],
)
def test_wrong_but_for_their_form(answer: str, expected: str, remark: str, tmp_path: Path) -> None:
    scores = score_files("text", *pair(tmp_path, [answer] * 2, [expected] * 2))
    assert scores["metrics"]["exact match"]["value"] == 0
    said = [one for one in scores["remarks"] if not one.startswith("Only 2")]
    assert any(one.startswith(remark) for one in said) if remark else said == []
