"""DocVQA's questions and submissions.

Release: `{"data": [{"questionId", "question", "image", "docId", "answers", "data_split", …}]}`, without answers for the
test split; files `…_withQT.json` add `question_types`. Submission: `[{"questionId", "answer"}]`.
Source: rrc.cvc.uab.es, challenge 17, task 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.examples import raise_faults
from ftlib.data.official.results import (
    Types,
    by_id,
    check_records,
    name_ids,
    read_json_file,
    read_records,
    require_fields,
    require_same_ids,
)
from ftlib.errors import UserError
from ftlib.metrics import anls
from ftlib.metrics.totals import Measured

Id = int | str
_ID: tuple[type, ...] = (int, str)
_QUESTION: Types = {"questionId": _ID, "question": str, "image": str}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a page.

    Attributes:
        image: path of the page's picture, relative to the release's root.
        document: the document's id, or the image where the release names no document.
        answers: all accepted answers; empty for the test split.
        types: the question's types (table/list, handwritten, …), where the release has them.
    """

    question_id: Id
    question: str
    image: str
    document: Id
    answers: tuple[str, ...]
    types: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """Read a release file, of any split.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    content = read_json_file(path)
    records = content.get("data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path}: an object with a list `data` is needed")
    check_records(path, records, _QUESTION, "question")
    by_id(path, records, "questionId")
    faults = [(record["questionId"], fault) for record in records for fault in _faults(record)]
    raise_faults([f"{path}: question {key}: {fault}" for key, fault in faults], "Mend the file.")
    return [_question(record) for record in records]


def read_results(path: Path) -> dict[Id, str]:
    """Read a submission: question id → answer.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    records = by_id(path, read_records(path, {"questionId": _ID, "answer": str}), "questionId")
    return {key: record["answer"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> Measured:
    """ANLS of a submission.

    Args:
        references: the split's one file, with answers.

    Raises:
        UserError: malformed files, no answers, or not the same questions in both.
    """
    if len(references) != 1:
        raise UserError(f"docvqa needs one reference file, e.g. val_v1.0_withQT.json; got {len(references)}")
    questions = read_questions(references[0])
    if without := [question.question_id for question in questions if not question.answers]:
        problem = f"{references[0]}: {len(without)} of {len(questions)} questions have no answers: {name_ids(without)}"
        raise UserError(problem, "The test split's submissions go to the challenge's server.")
    answers = read_results(predictions)
    require_same_ids(predictions, answers, (question.question_id for question in questions), "questionId")
    types = [question.types for question in questions]
    return anls.measure(
        [answers[question.question_id] for question in questions],
        [question.answers for question in questions],
        [question.document for question in questions],
        {"question type": types},
    )


def parse_question(record: dict[str, Any]) -> Question:
    """Parse a question of the release.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, _QUESTION)
    if faults := _faults(record):
        raise ValueError(faults[0])
    return _question(record)


def _faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with the fields that not every split has."""
    found = []
    for name in ("answers", "question_types"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            found.append(f"field {name}: a list of texts expected, found {value!r}"[:300])
    if isinstance(record.get("docId", ""), bool) or not isinstance(record.get("docId", ""), _ID):
        found.append(f"field docId: int or str expected, found {record['docId']!r}"[:300])
    return found


def _question(record: dict[str, Any]) -> Question:
    return Question(
        record["questionId"],
        record["question"],
        record["image"],
        record.get("docId", record["image"]),
        tuple(record.get("answers", ())),
        tuple(record.get("question_types", ())),
    )
