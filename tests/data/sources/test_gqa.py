"""GQA's files: read, scored, written, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.cli.main import main
from ftlib.data.sources.gqa import read_choices, read_questions, read_results, score
from ftlib.errors import UserError
from tests.metrics import literal_gqa


def question(answer: str, image: str, **fields: Any) -> dict[str, Any]:
    program = [{"operation": "select", "argument": "dog (1)", "dependencies": []}]
    program.append({"operation": "exist", "argument": "?", "dependencies": [0]})
    kinds = {"structural": "verify", "semantic": "obj", "detailed": "existC"}
    groups = {"global": None, "local": "12-dog"}
    told = {"fullAnswer": answer, "annotations": {"question": {"3": "99"}, "answer": {}, "fullAnswer": {}}}
    asked = {"question": "Is there a dog?", "imageId": image, "isBalanced": True, "answer": answer, "entailed": []}
    return {**asked, "types": kinds, "groups": groups, "semantic": program, "equivalent": [], **told, **fields}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents: dict[str, Any] = {
        "questions": {
            "01": question("yes", "7", entailed=["01", "02", "03"], groups={"global": "dog", "local": None}),
            "02": question("red", "7", types={"structural": "query", "semantic": "attr", "detailed": "color"}),
            "03": question("no", "8", isBalanced=False),
        },
        "choices": {key: {"valid": ["yes", "no", "red"], "plausible": ["yes", "red"]} for key in ("01", "02", "03")},
        "predictions": [
            {"questionId": key, "prediction": text} for key, text in (("03", "no"), ("02", "no"), ("01", "yes"))
        ],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: tmp_path / f"{name}.json" for name in contents}


def change(path: Path, edit: Any) -> None:
    """Apply a function to a JSON file's content."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_score_equals_the_literal_one(files: dict[str, Path]) -> None:
    measured = score([files["questions"]], files["predictions"], choices=files["choices"])
    questions, choices = (json.loads(files[name].read_text()) for name in ("questions", "choices"))
    expected = literal_gqa.scores(questions, read_results(files["predictions"]), choices)
    assert measured.values() == pytest.approx(expected)
    assert (expected["accuracy"], expected["consistency"], expected["plausibility"]) == (50, 50, 50)
    assert measured.sample.groups == ["7"]


def test_command(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "gqa", "--references", str(files["questions"]), "--predictions", str(files["predictions"])]
    assert main([*command, "--choices", str(files["choices"]), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["metric"], found["value"], found["unit"], found["n"]) == ("accuracy", 50, "percent", 2)
    assert found["metrics"]["distribution"]["value"] == 0
    assert "grounding: not computed: needs the model's attention maps" in captured.err


def test_only_balanced_questions_need_an_answer(files: dict[str, Path]) -> None:
    change(files["predictions"], lambda c: c.pop(0))
    measured = score([files["questions"]], files["predictions"])
    assert measured.values()["accuracy"] == 50
    assert "consistency" in measured.notes


def test_a_folder_of_chunks(files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "train_all_questions"
    folder.mkdir()
    with pytest.raises(UserError, match="no JSON files"):
        read_questions(folder)
    questions = json.loads(files["questions"].read_text())
    for number, key in enumerate(questions):
        (folder / f"train_all_questions_{number}.json").write_text(json.dumps({key: questions[key]}))
    assert read_questions(folder) == read_questions(files["questions"])
    (folder / "train_all_questions_9.json").write_text(json.dumps({"01": questions["01"]}))
    with pytest.raises(UserError, match=r"questions_9\.json: .* another chunk also has: 01"):
        read_questions(folder)


def test_the_test_split_has_questions_only(files: dict[str, Path]) -> None:
    asked = {"201": {"question": "Is it?", "imageId": "n1", "isBalanced": True}}
    files["questions"].write_text(json.dumps(asked))
    assert read_questions(files["questions"])["201"].image == "n1"
    with pytest.raises(UserError, match="1 balanced questions have no answer: 201"):
        score([files["questions"]], files["predictions"])


def test_results_are_read_as_written(tmp_path: Path) -> None:
    records = [{"questionId": "01", "prediction": "zwei\n"}, {"questionId": "02", "prediction": "é"}]
    (tmp_path / "p.json").write_text(json.dumps(records))
    assert read_results(tmp_path / "p.json") == {"01": "zwei\n", "02": "é"}


def test_ids_may_be_numbers(files: dict[str, Path]) -> None:
    questions = json.loads(files["questions"].read_text().replace('"0', '"1').replace("gl1", "gl0"))
    predictions = json.loads(files["predictions"].read_text().replace('"0', '"1'))
    files["questions"].write_text(json.dumps(questions))
    files["predictions"].write_text(json.dumps(predictions))
    expected = score([files["questions"]], files["predictions"]).values()
    numbers = [{**record, "questionId": int(record["questionId"])} for record in predictions]
    files["predictions"].write_text(json.dumps(numbers))
    assert score([files["questions"]], files["predictions"]).values() == pytest.approx(expected, nan_ok=True)


def test_choices(files: dict[str, Path]) -> None:
    assert read_choices(files["choices"])["02"].plausible == ("yes", "red")


FAULTS: dict[str, tuple[str, Any, str]] = {
    "unanswered": ("predictions", lambda c: c.pop(1), "1 of 3 questionIds have no answer: 02"),
    "unknown": ("predictions", lambda c: c.append({"questionId": "9", "prediction": ""}), "not in the references: 9"),
    "answered twice": ("predictions", lambda c: c.append(c[0]), "questionId occurs more than once: 03"),
    "no predictions": ("predictions", lambda c: c.clear(), "contains no records"),
    "id is a list": (
        "predictions",
        lambda c: c[0].update(questionId=[3]),
        "record 1: field questionId: str or int expe",
    ),
    "id is a number": (
        "predictions",
        lambda c: c[0].update(questionId=3),
        "questionIds that are not in the references",
    ),
    "prediction missing": ("predictions", lambda c: c[0].pop("prediction"), "field prediction is missing"),
    "no questions": ("questions", lambda c: c.clear(), "must be an object with question ids as keys"),
    "question is a number": ("questions", lambda c: c.update({"04": 3}), "question 04: is not a valid object"),
    "no image": ("questions", lambda c: c["02"].pop("imageId"), "question 02: is not a valid object"),
    "image is a number": ("questions", lambda c: c["02"].update(imageId=3), "question 02: field imageId: str expected"),
    "balanced is a text": ("questions", lambda c: c["02"].update(isBalanced="yes"), "02: field isBalanced: bool"),
    "no types": ("questions", lambda c: c["02"].pop("types"), "question 02: field types is missing"),
    "type is null": ("questions", lambda c: c["02"]["types"].update(semantic=None), "02: field semantic: str expected"),
    "group is a list": ("questions", lambda c: c["02"]["groups"].update({"global": []}), "02: field global: str or No"),
    "entailed a number": ("questions", lambda c: c["02"].update(entailed=[3]), "question 02: field entailed: a list"),
    "step is a text": ("questions", lambda c: c["02"].update(semantic=["x"]), "question 02: field semantic: objects"),
    "nothing balanced": (
        "questions",
        lambda c: [one.update(isBalanced=False) for one in c.values()],
        "contains no balanced questions",
    ),
    "choices missing": ("choices", lambda c: c.pop("02"), "no choices for 1 questions: 02"),
    "valid is a text": (
        "choices",
        lambda c: c["02"].update(valid="x"),
        "choices of question 02: field valid: list exp",
    ),
    "plausible missing": ("choices", lambda c: c["02"].pop("plausible"), "question 02: field plausible is missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    which, edit, words = FAULTS[name]
    change(files[which], edit)
    command = ["score", "gqa", "--references", str(files["questions"]), "--predictions", str(files["predictions"])]
    assert main([*command, "--choices", str(files["choices"])]) == 2
    shown = capsys.readouterr().err
    assert words in shown and files[which].name in shown and "Traceback" not in shown


def test_a_question_that_stands_twice_is_named(files: dict[str, Path]) -> None:
    one = json.dumps(question("yes", "7"))
    files["questions"].write_text(f'{{"01": {one}, "02": {one}, "01": {one}}}')
    with pytest.raises(UserError, match="duplicate key '01' in an object"):
        read_questions(files["questions"])


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1, 2", b"3", b"[3]"])
@pytest.mark.parametrize("which", ["questions", "choices", "predictions"])
def test_broken_files(files: dict[str, Path], which: str, content: bytes) -> None:
    files[which].write_bytes(content)
    with pytest.raises(UserError, match=f"{which}.json"):
        score([files["questions"]], files["predictions"], choices=files["choices"])


def test_one_reference(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="one file"):
        score([files["questions"], files["questions"]], files["predictions"])
