"""DocVQA's files: read, scored, written, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.cli.main import main
from ftlib.data.sources.docvqa import DocVqaQuestion, read_questions, read_results, score
from ftlib.errors import UserError


def question(number: int, answers: list[str], document: int, **fields: Any) -> dict[str, Any]:
    page = {"image": f"documents/d{document}_1.png", "docId": document, "ucsf_document_id": "xx", "data_split": "val"}
    return {"questionId": number, "question": f"What is {number}?", "answers": answers, **page, **fields}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    data = [
        question(337, ["0.28"], 1, question_types=["table/list", "form"]),
        question(338, ["abxx", "Coca Cola"], 1, question_types=["form"]),
        question(340, ["$5"], 2, question_types=[]),
    ]
    results = [{"questionId": n, "answer": a} for n, a in [(340, "$5"), (337, "0.3"), (338, "abcd")]]
    (tmp_path / "val.json").write_text(json.dumps({"dataset_name": "docvqa", "data": data}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return {"val": tmp_path / "val.json", "results": tmp_path / "results.json"}


def change(path: Path, edit: Any) -> None:
    """Apply a function to a JSON file's content."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_score(files: dict[str, Path]) -> None:
    measured = score([files["val"]], files["results"])
    assert measured.rows == [0.5, 0.5, 1]
    assert measured.values() == pytest.approx(
        {"anls": 2 / 3, "anls_strict": 1 / 3, "question type: form": 0.5, "question type: table/list": 0.5}
    )
    assert measured.sample.groups == [1, 2]


def test_command(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "docvqa", "--references", str(files["val"]), "--predictions", str(files["results"]), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rule"], found["unit"], found["n"]) == ("anls/rrc-ch17", "fraction", 3)
    assert found["value"] == pytest.approx(2 / 3)


def test_records(files: dict[str, Path]) -> None:
    first = read_questions(files["val"])[0]
    assert first == DocVqaQuestion(337, "What is 337?", "documents/d1_1.png", 1, ("0.28",), ("table/list", "form"))


def test_the_image_stands_for_a_document_without_id(files: dict[str, Path]) -> None:
    change(files["val"], lambda c: [one.pop("docId") for one in c["data"]])
    assert score([files["val"]], files["results"]).sample.groups == ["documents/d1_1.png", "documents/d2_1.png"]


def test_the_test_split_has_questions_only(files: dict[str, Path]) -> None:
    change(files["val"], lambda c: [(one.pop("answers"), one.pop("question_types")) for one in c["data"]])
    assert read_questions(files["val"])[2].answers == ()
    with pytest.raises(UserError, match="3 of 3 questions have no answers: 337, 338, 340"):
        score([files["val"]], files["results"])


def test_results_are_read_as_written(tmp_path: Path) -> None:
    records = [{"questionId": 3, "answer": "zwei\n"}, {"questionId": 4, "answer": '"é'}]
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert read_results(tmp_path / "results.json") == {3: "zwei\n", 4: '"é'}


def test_one_reference_file(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="one reference file"):
        score([files["val"], files["val"]], files["results"])


FAULTS: dict[str, tuple[str, Any, str]] = {
    "unanswered": ("results", lambda c: c.pop(0), "1 of 3 questionIds have no answer: 340"),
    "unknown": ("results", lambda c: c.append({"questionId": 9, "answer": "x"}), "not in the references: 9"),
    "answered twice": ("results", lambda c: c.append(c[0]), "questionId occurs more than once: 340"),
    "no results": ("results", lambda c: c.clear(), "contains no records"),
    "a list of answers": ("results", lambda c: c[0].update(answer=["x"]), "record 1: field answer: str expected"),
    "no data": ("val", lambda c: c.pop("data"), "an object with a list `data`"),
    "empty": ("val", lambda c: c["data"].clear(), "contains no questions"),
    "questions twice": ("val", lambda c: c["data"].append(c["data"][0]), "questionId occurs more than once: 337"),
    "no image": ("val", lambda c: c["data"][1].pop("image"), "question 2: field image is missing"),
    "answers is a text": ("val", lambda c: c["data"][1].update(answers="x"), "question 338: field answers: a list"),
    "a number among answers": ("val", lambda c: c["data"][1].update(answers=["x", 3]), "question 338: field answers"),
    "no answers": ("val", lambda c: c["data"][1].update(answers=[]), "1 of 3 questions have no answers: 338"),
    "types is a text": ("val", lambda c: c["data"][0].update(question_types="form"), "337: field question_types"),
    "document is a list": ("val", lambda c: c["data"][0].update(docId=[1]), "337: field docId: int or str expected"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    which, edit, words = FAULTS[name]
    change(files[which], edit)
    command = ["score", "docvqa", "--references", str(files["val"]), "--predictions", str(files["results"])]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert words in shown and files[which].name in shown and "Traceback" not in shown


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1, 2", b"3", b"[]", b"{}", b"[3]"])
@pytest.mark.parametrize("which", ["val", "results"])
def test_broken_files(files: dict[str, Path], which: str, content: bytes) -> None:
    files[which].write_bytes(content)
    with pytest.raises(UserError, match=f"{which}.json"):
        score([files["val"]], files["results"])
