"""Classification from JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlib.errors import UserError
from ftlib.tasks.classify import score
from ftlib.tasks.registry import load_task


def files(folder: Path, labels: list[list[str]], answers: list[str]) -> tuple[Path, Path]:
    asked = [{"id": n, "references": label, "image": f"{n % 2}"} for n, label in enumerate(labels)]
    answered = [{"id": n, "prediction": answer} for n, answer in enumerate(answers)]
    for name, records in (("references", asked), ("predictions", answered)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "references.jsonl", folder / "predictions.jsonl"


def test_labels_are_those_of_the_references(tmp_path: Path) -> None:
    references, predictions = files(tmp_path, [["b"], [" a"], ["b"], ["a"]], ["b ", "a", "c", "b"])
    measured = score([references], predictions, positive="b")
    assert measured.tables["labels"] == ["a", "b"]
    assert measured.tables["positive"] == {"label": "b", "tp": 1, "tn": 1, "fp": 1, "fn": 1}
    assert (measured.values()["accuracy"], measured.invalid, len(measured.sample.groups)) == (0.5, 1, 2)
    assert "precision" not in score([references], predictions).values()


def test_a_positive_label_must_occur(tmp_path: Path) -> None:
    references, predictions = files(tmp_path, [["a"], ["b"]], ["a", "b"])
    with pytest.raises(UserError, match=r"c: no such label(.|\n)*a, b"):
        score([references], predictions, positive="c")


def test_one_label_for_each_row(tmp_path: Path) -> None:
    references, predictions = files(tmp_path, [["a"], ["b", "c"]], ["a", "b"])
    with pytest.raises(UserError, match=r"references\.jsonl: id 1: 2 labels"):
        score([references], predictions)


def test_numbers_are_labels(tmp_path: Path) -> None:
    references, predictions = files(tmp_path, [["1"], ["2.5"], ["1"]], ["1", "2.5", "2.5"])
    expected = score([references], predictions).values()
    references.write_text('{"id": 0, "suffix": 1}\n{"id": 1, "suffix": 2.5}\n{"id": 2, "references": [1]}\n')
    predictions.write_text('{"id": 0, "prediction": 1}\n{"id": 1, "prediction": 2.5}\n{"id": 2, "prediction": 2.5}\n')
    assert score([references], predictions).values() == expected
    for line in ('{"id": 0, "prediction": true}', '{"id": 0, "prediction": NaN}'):
        predictions.write_text(line + '\n{"id": 1, "prediction": 1}\n{"id": 2, "prediction": 1}\n')
        with pytest.raises(UserError, match="prediction"):
            score([references], predictions)


def test_rows_of_text_are_independent() -> None:
    """They have no image: each is a group of its own, else there would be no interval."""
    fields = {"image": "", "references": ["a"], "prediction": "a"}
    measured = load_task("classify").score([{"id": str(n), **fields} for n in range(40)], ["a", "b"], None)
    assert len(measured.sample.groups) == 40
