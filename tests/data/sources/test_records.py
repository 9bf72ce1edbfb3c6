"""JSONL of references and predictions: what is read, and every fault named, for each task that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.cli.main import main
from ftlib.data.sources.records import (
    format_ids,
    read_records,
    read_text_predictions,
    read_text_references,
    require_same_ids,
)
from ftlib.errors import UserError


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def predicted(path: Path, rows: list[Any]) -> list[str]:
    return [one["prediction"] for one in read_text_predictions(path, rows)]


def test_references_in_both_forms(tmp_path: Path) -> None:
    records = [
        {"id": 1, "references": ["a", " b "], "image": "x.png"},
        {"id": "two", "suffix": "c\n", "prefix": "what?"},
        {"id": 3, "references": ["d"], "image": 17},
    ]
    rows = read_text_references(jsonl(tmp_path / "references.jsonl", records))
    assert [row.id for row in rows] == ["1", "two", "3"]
    assert [row.expected for row in rows] == [("a", "b"), ("c",), ("d",)]
    assert [row.image for row in rows] == ["x.png", None, "17"]
    assert rows[1].group != rows[0].group == ("image", "x.png")


def test_a_row_without_image_is_alone_even_if_named_like_one(tmp_path: Path) -> None:
    records = [{"id": "x", "suffix": "a"}, {"id": "y", "suffix": "a", "image": "x"}]
    first, second = read_text_references(jsonl(tmp_path / "references.jsonl", records))
    assert first.group != second.group


def test_predictions_come_in_the_order_of_the_references(tmp_path: Path) -> None:
    rows = read_text_references(jsonl(tmp_path / "references.jsonl", [{"id": n, "suffix": "a"} for n in (3, 1, 2)]))
    found = [{"id": "1", "prediction": " one "}, {"id": 2, "prediction": "two"}, {"id": "3", "prediction": ""}]
    assert predicted(jsonl(tmp_path / "predictions.jsonl", found), rows) == ["", "one", "two"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = read_text_references(
        jsonl(tmp_path / "references.jsonl", [{"id": "ä", "suffix": "a"}, {"id": 2, "suffix": "b"}])
    )
    answers = [{"id": "2", "prediction": "猫\nhund"}, {"id": "ä", "prediction": "a"}]
    assert predicted(jsonl(tmp_path / "predictions.jsonl", answers), rows) == ["a", "猫\nhund"]


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.json", "answers.txt", "answers"])
@pytest.mark.parametrize("form", ["lines", "list", "printed list", "lines of objects in objects"])
def test_lines_and_lists_are_told_apart_by_content(tmp_path: Path, name: str, form: str) -> None:
    records: list[Any] = [{"id": n, "prediction": "a"} for n in range(3)]
    if form == "lines of objects in objects":
        records = [{"facts": {"a": {}}, **record} for record in records]
    path = tmp_path / name
    if form.startswith("lines"):
        jsonl(path, records)
    else:
        path.write_text(json.dumps(records, indent=2 if form == "printed list" else None))
    rows = read_text_references(jsonl(tmp_path / "references", [{"id": n, "suffix": "a"} for n in range(3)]))
    assert predicted(path, rows) == ["a"] * 3


def test_a_printed_object_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"x": {},\n"answers": {"1": "a"}\n}\n')
    with pytest.raises(UserError, match="must be a list of records, got dict"):
        read_records(path, {})


def test_messages_name_what_the_file_has(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "answers.jsonl", [{"id": 1, "answer": "a"}])
    rows = read_text_references(jsonl(tmp_path / "references", [{"id": 1, "suffix": "a"}]))
    with pytest.raises(UserError, match="record 1: field prediction is missing; available: id, answer"):
        read_text_predictions(path, rows)
    with pytest.raises(UserError, match=r"suffix .one text. is missing; available: id, answer"):
        read_text_references(path)
    with pytest.raises(UserError, match=r"1 ids that are not in the references: 7 .text; in the references number."):
        require_same_ids(path, ["7"], [8], "id")


BOX = [1, 2, 30, 40]
MASK = {"size": [2, 3], "counts": [1, 2, 3]}
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classify": ({"references": ["a"]}, {"prediction": "a"}),
    "text": ({"references": ["a"]}, {"prediction": "a"}),
    "refer": ({"box": BOX}, {"box": BOX}),
    "segment": ({"mask": MASK}, {"mask": MASK}),
}
"""Task → what a line of the references and of the predictions holds besides its id."""


def run(folder: Path, task: str, references: list[Any], predictions: list[Any], *more: str) -> int:
    files = jsonl(folder / "references.jsonl", references), jsonl(folder / "predictions.jsonl", predictions)
    return main(["score", task, "--references", str(files[0]), "--predictions", str(files[1]), *more])


@pytest.mark.parametrize("task", GOOD)
def test_command(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = GOOD[task]
    references = [{"id": n, **expected, "image": f"{n // 2}.png"} for n in range(6)]
    assert run(tmp_path, task, references, [{"id": str(n), **found} for n in range(6)], "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["value"] in (1, 100)
    assert (scores["n"], scores["groups"], scores["invalid"]) == (6, 3, 0)


@pytest.mark.parametrize("task", GOOD)
def test_ids_must_be_the_same(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = GOOD[task]
    references = [{"id": n, **expected} for n in (1, 2, 3)]
    for ids, said in (
        ([1, 3], "1 of 3 ids have no answer: 2"),
        ([1, 2, 3, 4], "1 ids that are not in the references: 4"),
        ([1, 2, 3, "3"], "id occurs more than once: 3"),
        ([], "contains no records"),
        ([1, 2, 3.5], "record 3: field id: str or int expected, found 3.5"),
        ([1, 2, None], "record 3: field id"),
    ):
        assert run(tmp_path, task, references, [{"id": key, **found} for key in ids]) == 2
        printed = capsys.readouterr().err
        assert said in printed and "predictions.jsonl" in printed


@pytest.mark.parametrize("task", GOOD)
def test_faulty_references(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = GOOD[task]
    predictions = [{"id": 1, **found}, {"id": 2, **found}]
    for references, said in (
        ([], "contains no records"),
        ([{"id": 1, **expected}, {"id": 1, **expected}], "id occurs more than once: 1"),
        ([{"id": 1, **expected}, {"id": 2}], "is missing"),
        ([{"id": 1, **expected}, {**expected}], "record 2: field id is missing"),
        ([{"id": 1, **expected}, {"id": 2, **expected, "image": ["x"]}], "field image"),
        ([{"id": 1, **expected}, ["x"]], "record 2: not an object"),
    ):
        assert run(tmp_path, task, references, predictions) == 2
        printed = capsys.readouterr().err
        assert said in printed and "references.jsonl" in printed


@pytest.mark.parametrize("task", GOOD)
@pytest.mark.parametrize("text", [b"", b"{", b'{"id": 1}{', b"\xff\xfe", b"3\n"])
def test_broken_files(tmp_path: Path, task: str, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = GOOD[task]
    good = jsonl(tmp_path / "good.jsonl", [{"id": 1, **expected, **found}])
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(text)
    for references, predictions in ((broken, good), (good, broken), (good, tmp_path / "none"), (tmp_path, good)):
        assert main(["score", task, "--references", str(references), "--predictions", str(predictions)]) == 2
        assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("task", GOOD)
def test_one_reference_file(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, found = GOOD[task]
    good = str(jsonl(tmp_path / "good.jsonl", [{"id": 1, **expected, **found}]))
    assert main(["score", task, "--references", good, good, "--predictions", good]) == 2
    assert "one reference file" in capsys.readouterr().err


@pytest.mark.parametrize("references", [[], [[3]], [True], "a", None])
def test_references_must_be_texts(tmp_path: Path, references: Any) -> None:
    path = jsonl(tmp_path / "references.jsonl", [{"id": 1, "references": references}])
    with pytest.raises(UserError, match="id 1: field references"):
        read_text_references(path)


def test_ids_in_messages_are_short_and_can_be_printed() -> None:
    shown = format_ids(["x" * 5000, "\ud800", 7])
    assert shown == f"7, {'x' * 100}, \\ud800"
