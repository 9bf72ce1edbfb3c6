"""DocVQA: training and validation questions as splits train and valid.

Files in `data.root` or in one folder below: `{train,val}_v1.0_withQT.json` (with question types) or
`{train,val}_v1.0.json`, pages in `documents/` (in newer downloads `spdocvqa_images/`), or in such folders in `train/`
and `val/`. The test split has no answers and is not read. Source: rrc.cvc.uab.es, challenge 17, task 1, which
recommends to train on the first answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord, raise_all
from ftlib.data.sources.base import NumberedFile, RowParser, RowReader, require_text
from ftlib.data.sources.json_stream import stream_lists
from ftlib.data.sources.records import (
    Types,
    align_predictions,
    check_records,
    format_ids,
    index_by_id,
    read_json_file,
    read_records,
    require_fields,
)
from ftlib.data.sources.release_files import OfficialSplit, find_release_files, image_dir, image_name
from ftlib.errors import UserError
from ftlib.metrics import anls
from ftlib.metrics.base import MetricResult

_PARTS: dict[OfficialSplit, str] = {"train": "train", "valid": "val"}
_FILES: list[list[list[dict[OfficialSplit, str]]]] = [
    [[{part: f"{name}_v1.0_withQT.json"}], [{part: f"{name}_v1.0.json"}]] for part, name in _PARTS.items()
]
PAGES = ("documents", "spdocvqa_images")


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads.

    Raises:
        UserError: there are none, or files of several releases.
    """
    return list(find_release_files(data, *_FILES).values())


@register_source(name="docvqa")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each question; the suffix is the first answer, references are all; a document is a group.

    Raises:
        UserError: missing files, files that are not such JSON.
    """
    root, reading = Path(data.root), RowReader()
    for part, path in find_release_files(data, *_FILES).items():
        pages = _pages(root, path, _PARTS[part])
        records = ((number, record) for _, number, record in stream_lists(path, ["data"]))
        yield from reading.rows(NumberedFile(path, "question"), records, _parser(part, pages))


def _pages(root: Path, path: Path, split: str) -> str:
    """Return the folder of a split's pages: beside the questions, in the split's folder, or the common folder."""
    for folder in [above / name for above in (path.parent, root / split) for name in PAGES]:
        if folder.is_dir():
            return folder.relative_to(root).as_posix()
    return image_dir(root, *PAGES)


def _parser(part: OfficialSplit, folder: str) -> RowParser:
    def parse(record: dict[str, Any], number: int) -> list[Example]:
        question = parse_question(record)
        if not question.answers:
            raise ValueError("field answers: is missing or empty")
        facts: dict[str, Any] = {"questionId": question.question_id, "docId": question.document}
        facts["question"] = question.question
        if "question_types" in record:
            facts["question_types"] = list(question.types)
        image = image_name(folder, question.image.removeprefix(f"{PAGES[0]}/"))
        suffix, group = require_text(question.answers[0], "answers"), str(question.document)
        key = str(question.question_id)
        row = Example(key, image, question.question, suffix, question.answers, facts, part, group)
        return [replace(row, part_name=_PARTS[part])]

    return parse


# DocVQA's questions and submissions.
#
# Release: `{"data": [{"questionId", "question", "image", "docId", "answers", "data_split", …}]}`, without answers for
# the test split; files `…_withQT.json` add `question_types`. Submission: `[{"questionId", "answer"}]`. Source:
# rrc.cvc.uab.es, challenge 17, task 1.

Id = int | str
_ID: tuple[type, ...] = (int, str)
_QUESTION: Types = {"questionId": _ID, "question": str, "image": str}


@dataclass(frozen=True, slots=True)
class DocVqaQuestion:
    """A question about a page.

    Attributes:
        image: path of the page's image, relative to the release's root.
        document: ID of the document, or the image if the release has no document IDs.
        answers: all accepted answers; empty for the test split.
        types: the question's types (table/list, handwritten, …), if the release has them.
    """

    question_id: Id
    question: str
    image: str
    document: Id
    answers: tuple[str, ...]
    types: tuple[str, ...]


def read_questions(path: Path) -> list[DocVqaQuestion]:
    """Read a release file of any split.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    content = read_json_file(path)
    records = content.get("data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path}: must be an object with a list `data`")
    check_records(path, records, _QUESTION, "question")
    index_by_id(path, records, "questionId")
    faults = [(record["questionId"], fault) for record in records for fault in _errors(record)]
    raise_all([f"{path}: question {key}: {fault}" for key, fault in faults], "Fix the file.")
    return [_question(record) for record in records]


def read_results(path: Path) -> dict[Id, str]:
    """Read a submission: question ID → answer.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    records = index_by_id(path, read_records(path, {"questionId": _ID, "answer": str}), "questionId")
    return {key: record["answer"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return the ANLS of a submission.

    Args:
        references: the split's file, with answers.

    Raises:
        UserError: malformed files, no answers, or different questions in both.
    """
    if len(references) != 1:
        raise UserError(f"docvqa needs one reference file, e.g. val_v1.0_withQT.json; got {len(references)}")
    questions = read_questions(references[0])
    if without := [question.question_id for question in questions if not question.answers]:
        problem = (
            f"{references[0]}: {len(without)} of {len(questions)} questions have no answers: {format_ids(without)}"
        )
        raise UserError(problem, "The test split's submissions go to the challenge's server.")
    ids = [question.question_id for question in questions]
    answers = align_predictions(predictions, read_results(predictions), ids, "questionId")
    types = [question.types for question in questions]
    found = anls.measure(
        [answers[key] for key in ids],
        [question.answers for question in questions],
        [question.document for question in questions],
        {"question type": types},
    )
    return replace(found, answers=[{"prediction": text} for text in answers.values()])


def parse_question(record: dict[str, Any]) -> DocVqaQuestion:
    """Parse a question of the release.

    Raises:
        ValueError: the record is invalid.
    """
    require_fields(record, _QUESTION)
    if faults := _errors(record):
        raise ValueError(faults[0])
    return _question(record)


def _errors(record: dict[str, Any]) -> list[str]:
    """Return errors of the fields that not every split has."""
    found = []
    for name in ("answers", "question_types"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            found.append(f"field {name}: a list of texts expected, found {value!r}"[:300])
    if isinstance(record.get("docId", ""), bool) or not isinstance(record.get("docId", ""), _ID):
        found.append(f"field docId: int or str expected, found {record['docId']!r}"[:300])
    return found


def _question(record: dict[str, Any]) -> DocVqaQuestion:
    return DocVqaQuestion(
        record["questionId"],
        record["question"],
        record["image"],
        record.get("docId", record["image"]),
        tuple(record.get("answers", ())),
        tuple(record.get("question_types", ())),
    )
