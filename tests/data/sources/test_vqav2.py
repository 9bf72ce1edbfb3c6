"""VQAv2's files: read, scored, written, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlib.cli.main import main
from ftlib.data.sources.vqav2 import Annotation, VqaQuestion, read_annotations, read_questions, read_results, score
from ftlib.errors import UserError

Content = dict[str, Any]


def annotation(number: int, answers: list[str], **fields: Any) -> Content:
    people = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)]
    kinds = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": answers[0]}
    return {"question_id": number, "image_id": number // 10, "answers": people} | kinds | fields


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A small split of three questions about two images, and right answers to two of them."""
    questions = [{"question_id": n, "image_id": n // 10, "question": f"What is {n}?"} for n in (10, 11, 20)]
    annotations = [
        annotation(10, ["net"] * 10),
        annotation(11, ["2"] * 2 + ["3"] * 8, answer_type="number"),
        annotation(20, ["yes"] * 10, answer_type="yes/no"),
    ]
    results = [{"question_id": n, "answer": a} for n, a in [(20, "yes"), (10, "racket"), (11, "two")]]
    contents: dict[str, Any] = {
        "questions": {"info": {}, "questions": questions},
        "annotations": {"info": {}, "annotations": annotations},
        "results": results,
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: tmp_path / f"{name}.json" for name in contents}


def change(path: Path, edit: Any) -> None:
    """Apply a function to a JSON file's content."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def scored(files: dict[str, Path]) -> Any:
    return score([files["questions"], files["annotations"]], files["results"])


def test_score_in_either_order(files: dict[str, Path]) -> None:
    measured = scored(files)
    assert measured.rows == pytest.approx([0, 0.6, 1])
    assert measured.values()["accuracy"] == pytest.approx(160 / 3)
    assert measured.values()["answer type: number"] == pytest.approx(60)
    assert measured.sample.groups == [1, 2]
    assert score([files["annotations"], files["questions"]], files["results"]).values() == measured.values()


def test_command(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    references = [str(files["questions"]), str(files["annotations"])]
    assert main(["score", "vqa", "--references", *references, "--predictions", str(files["results"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rule"], found["unit"], found["n"], found["groups"]) == ("vqa-accuracy/a013f00", "percent", 3, 2)
    assert found["value"] == pytest.approx(160 / 3)


def test_records(files: dict[str, Path]) -> None:
    assert read_questions(files["questions"])[0] == VqaQuestion(10, 1, "What is 10?")
    assert read_annotations(files["annotations"])[0] == Annotation(10, 1, "what", "other", ("net",) * 10, "net")


def test_results_are_read_as_written(tmp_path: Path) -> None:
    answers = {3: "zwei\n", "4": '"é'}
    records = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert read_results(tmp_path / "results.json") == answers


def test_test_splits_have_questions_only(files: dict[str, Path]) -> None:
    assert len(read_questions(files["questions"])) == 3
    with pytest.raises(UserError, match="two reference files"):
        score([files["questions"]], files["results"])
    with pytest.raises(UserError, match="two reference files"):
        score([files["questions"], files["questions"]], files["results"])


def test_records_without_answer_ids_count_as_different_people(files: dict[str, Path]) -> None:
    def drop(content: Any) -> None:
        for record in content["annotations"]:
            record["answers"] = [{"answer": one["answer"]} for one in record["answers"]]

    before = scored(files).rows
    change(files["annotations"], drop)
    assert scored(files).rows == before


FAULTS: dict[str, tuple[str, Any, str]] = {
    "unanswered": ("results", lambda c: c.pop(0), "1 of 3 question_ids have no answer: 20"),
    "unknown": ("results", lambda c: c.append({"question_id": 99, "answer": "x"}), "not in the references: 99"),
    "answered twice": ("results", lambda c: c.append(c[0]), "question_id occurs more than once: 20"),
    "no results": ("results", lambda c: c.clear(), "contains no records"),
    "answer is no text": ("results", lambda c: c[1].update(answer=None), "record 2: field answer: str expected"),
    "id is a list": ("results", lambda c: c[1].update(question_id=[1]), "record 2: field question_id"),
    "answer missing": ("results", lambda c: c[1].pop("answer"), "record 2: field answer is missing"),
    "no questions": ("questions", lambda c: c["questions"].clear(), "contains no questions"),
    "questions twice": ("questions", lambda c: c["questions"].append(c["questions"][0]), "more than once: 10"),
    "image is a list": ("questions", lambda c: c["questions"][1].update(image_id=[1]), "question 2: field image_id"),
    "questions no list": ("questions", lambda c: c.update(questions=3), "must have a list `questions`"),
    "other split": ("questions", lambda c: c["questions"][0].update(question_id=7), "have no answer: 7"),
    "no annotations": ("annotations", lambda c: c["annotations"].clear(), "contains no annotations"),
    "annotated twice": ("annotations", lambda c: c["annotations"].append(c["annotations"][0]), "more than once: 10"),
    "annotation is a number": ("annotations", lambda c: c["annotations"].insert(1, 5), "annotation 2: is not a valid"),
    "answer type": ("annotations", lambda c: c["annotations"][2].update(answer_type=3), "annotation 3: field answer_t"),
    "nobody answered": ("annotations", lambda c: c["annotations"][2]["answers"].clear(), "annotation 3: field answers"),
    "texts and not": ("annotations", lambda c: c["annotations"][2].update(answers=["a", 1]), "annotation 3: field an"),
    "one answer": ("annotations", lambda c: c["annotations"][2].update(answers=["yes"]), "1 of 3 questions have fewer"),
    "three answers": ("annotations", lambda c: c["annotations"][1].update(answers=["2"] * 3), "than 4 answers: 11"),
    "same person": (
        "annotations",
        lambda c: c["annotations"][0]["answers"][1].update(answer_id=1),
        "duplicate answer_id",
    ),
    "image is true": ("annotations", lambda c: c["annotations"][0].update(image_id=True), "field image_id: int or str"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(files: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    which, edit, words = FAULTS[name]
    change(files[which], edit)
    references = [str(files["questions"]), str(files["annotations"])]
    assert main(["score", "vqa", "--references", *references, "--predictions", str(files["results"])]) == 2
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown
    assert files[which].name in shown or files["annotations"].name in shown


def test_conversions_score_the_same(files: dict[str, Path]) -> None:
    """TextVQA's and VizWiz' in this form: without kinds and images, answers as texts, ids as texts or numbers."""
    before = scored(files)

    def plain(content: Any) -> None:
        for record in content["annotations"]:
            record["answers"] = [one["answer"] for one in record["answers"]]
            for name in ("question_type", "answer_type", "image_id", "multiple_choice_answer"):
                record.pop(name)

    change(files["annotations"], plain)
    found = scored(files)
    assert (found.rows, found.sample.groups, found.values()) == (
        before.rows,
        [1, 2],
        {"accuracy": found.values()["accuracy"]},
    )
    change(files["results"], lambda content: [one.update(question_id=str(one["question_id"])) for one in content])
    assert scored(files).rows == before.rows
    change(files["questions"], lambda c: [one.update(question_id=str(one["question_id"])) for one in c["questions"]])
    assert scored(files).rows == before.rows
    change(files["questions"], lambda c: [one.pop("image_id") for one in c["questions"]])
    assert scored(files).rows == before.rows and len(scored(files).sample.groups) == 3


def test_a_breakdown_of_which_a_part_is_missing_is_left_out(files: dict[str, Path]) -> None:
    change(files["annotations"], lambda c: c["annotations"][2].pop("answer_type"))
    names = set(scored(files).values())
    assert names == {"accuracy", "question type: what"}


def test_an_id_as_text_and_as_number_is_answered_twice(files: dict[str, Path]) -> None:
    change(files["results"], lambda content: content.append({"question_id": "20", "answer": "no"}))
    with pytest.raises(UserError, match="question_id occurs more than once: 20"):
        scored(files)


@pytest.mark.parametrize("which", ["questions", "annotations", "results"])
def test_a_key_that_stands_twice_is_refused(files: dict[str, Path], which: str) -> None:
    """Plain `json.loads` keeps the last: another answer, or a whole list of them."""
    text = files[which].read_text()
    files[which].write_text(text.replace('"question_id": 11,', '"question_id": 10, "question_id": 11,', 1))
    with pytest.raises(UserError, match=rf"{which}\.json: duplicate key 'question_id' in an object: .*11"):
        scored(files)


def test_numbers_beyond_all_measure_are_refused(files: dict[str, Path]) -> None:
    change(files["annotations"], lambda content: content["annotations"][0].update(confidence=10**400))
    with pytest.raises(UserError, match="cannot be parsed as JSON: a number of 401 digits"):
        scored(files)


def test_results_are_a_list_or_lines_whatever_the_name(files: dict[str, Path]) -> None:
    before = scored(files).rows
    content = json.loads(files["results"].read_text())
    files["results"].write_text("".join(json.dumps(one) + "\n" for one in content))
    assert scored(files).rows == before
    files["results"] = files["results"].rename(files["results"].with_suffix(".jsonl"))
    assert scored(files).rows == before
    files["results"].write_text(json.dumps(content, indent=1))
    assert scored(files).rows == before
    files["results"].write_text(
        '{"question_id": 10, "answer": "a"}\n{"question_id": 11, "answer": "a", "answer": "b"}\n'
    )
    with pytest.raises(UserError, match=r"results\.jsonl:2: duplicate key 'answer'"):
        scored(files)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1, 2", b"3", b'{"annotations": [{"a": 1, "a": 2}]}'])
@pytest.mark.parametrize("which", ["questions", "annotations", "results"])
def test_broken_files(files: dict[str, Path], which: str, content: bytes) -> None:
    files[which].write_bytes(content)
    with pytest.raises(UserError):
        scored(files)


def test_missing_file(files: dict[str, Path]) -> None:
    files["annotations"].unlink()
    with pytest.raises(UserError, match=r"annotations\.json: cannot be read"):
        scored(files)
