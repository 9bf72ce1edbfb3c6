"""VQAv2's questions, annotations and result files (also OK-VQA's; VizWiz' once in this format).

Release: `{"questions": [{"question_id", "image_id", "question"}]}` and `{"annotations": [{"question_id", "image_id",
"question_type", "answer_type", "answers": [{"answer", …}], "multiple_choice_answer"}]}`, the latter missing for test
splits. Results: `[{"question_id", "answer"}]`. Source: visualqa.org/vqa_v2_teaser.html, visualqa.org/evaluation.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.official.large import read_large_json, require_parsed
from ftlib.data.official.results import Types, by_id, check_records, read_records, require_fields, require_same_ids
from ftlib.errors import UserError
from ftlib.metrics import vqa
from ftlib.metrics.totals import Measured

Id = int | str
_ID: tuple[type, ...] = (int, str)
_QUESTION: Types = {"question_id": _ID, "image_id": _ID, "question": str}
_ANNOTATION: Types = {"question_id": _ID, "image_id": _ID, "question_type": str, "answer_type": str, "answers": list}
_NEEDED = "vqa needs two reference files: the questions and the annotations of the same split"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the image it is about."""

    question_id: Id
    image_id: Id
    question: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """What people answered to a question.

    Attributes:
        answers: one of each person, as written, at least one.
        multiple_choice_answer: the most frequent answer; None where the release has none.
    """

    question_id: Id
    image_id: Id
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    multiple_choice_answer: str | None


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions, with or without annotations elsewhere.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    return _questions(path, _read(path))


def read_annotations(path: Path) -> list[Annotation]:
    """Read a file of annotations.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    return _annotations(path, _read(path))


def read_results(path: Path) -> dict[Id, str]:
    """Read a result file: question id → answer.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    records = by_id(path, read_records(path, {"question_id": _ID, "answer": str}), "question_id")
    return {key: record["answer"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """VQA accuracy of a result file.

    Args:
        references: the questions and the annotations of the split, in either order.

    Raises:
        UserError: malformed files, or not the same questions in all three.
    """
    annotations = _read_references(references)
    answers = read_results(predictions)
    require_same_ids(predictions, answers, (one.question_id for one in annotations), "question_id")
    return vqa.measure(
        [answers[one.question_id] for one in annotations],
        [one.answers for one in annotations],
        [one.image_id for one in annotations],
        {
            "answer type": [one.answer_type for one in annotations],
            "question type": [one.question_type for one in annotations],
        },
    )


def _read_references(paths: Sequence[Path]) -> list[Annotation]:
    if len(paths) != 2:
        raise UserError(f"{_NEEDED}; got {len(paths)}")
    contents = [_read(path) for path in paths]
    if "annotations" in contents[0]:
        paths, contents = paths[::-1], contents[::-1]
    if "questions" not in contents[0] or "annotations" not in contents[1]:
        raise UserError(_NEEDED, "Test splits have no annotations: their results go to the challenge's server.")
    questions, annotations = _questions(paths[0], contents[0]), _annotations(paths[1], contents[1])
    expected = (question.question_id for question in questions)
    require_same_ids(paths[1], (one.question_id for one in annotations), expected, "question_id")
    return annotations


def _read(path: Path) -> dict[str, Any]:
    content = read_large_json(path, "answers", parse_annotation)
    if not isinstance(content, dict):
        raise UserError(f"{path}: an object with `questions` or `annotations` is needed")
    return content


def parse_question(record: dict[str, Any]) -> Question:
    """Parse a question of the release.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, _QUESTION)
    return Question(*(record[name] for name in _QUESTION))


def parse_annotation(record: dict[str, Any]) -> Annotation:
    """Parse an annotation of the release.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, _ANNOTATION)
    best = record.get("multiple_choice_answer")
    return Annotation(
        record["question_id"],
        record["image_id"],
        sys.intern(record["question_type"]),
        sys.intern(record["answer_type"]),
        _answers(record["answers"]),
        best if isinstance(best, str) else None,
    )


def _answers(records: list[Any]) -> tuple[str, ...]:
    """The texts of answer records.

    The official program leaves out the records that equal the one at hand, all of them if their answer_ids do not
    tell them apart; so equal answer_ids are an error, and records without one count as different.
    """
    try:
        texts = tuple([sys.intern(record["answer"]) for record in records])
        known = [record["answer_id"] for record in records if "answer_id" in record]
        distinct = len(set(known))
    except (KeyError, TypeError):
        raise ValueError("field answers: objects with a text `answer` (and a simple `answer_id`) expected") from None
    if not texts:
        raise ValueError("field answers: is empty")
    if distinct < len(known):
        raise ValueError("field answers: the same answer_id more than once")
    return texts


def _questions(path: Path, content: dict[str, Any]) -> list[Question]:
    records = _list(path, content, "questions")
    check_records(path, records, _QUESTION, "question")
    by_id(path, records, "question_id")
    return [Question(*(record[name] for name in _QUESTION)) for record in records]


def _annotations(path: Path, content: dict[str, Any]) -> list[Annotation]:
    records = _list(path, content, "annotations")
    require_parsed(path, enumerate(records, 1), Annotation, "annotation")
    if not records:
        raise UserError(f"{path}: no annotations in it")
    by_id(path, ({"question_id": one.question_id} for one in records), "question_id")
    return records


def _list(path: Path, content: dict[str, Any], name: str) -> list[Any]:
    records = content.get(name)
    if not isinstance(records, list):
        raise UserError(f"{path}: a list `{name}` is needed")
    return records
