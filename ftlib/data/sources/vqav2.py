"""VQAv2, OK-VQA and VQA v1: train2014 and val2014 as splits train and valid.

Files in `data.root`, with or without the folders of the zips: `v2_OpenEnded_mscoco_{train,val}2014_questions.json`,
`v2_mscoco_{train,val}2014_annotations.json` (without `v2_` for the other datasets; `data.file` selects one by its file
of questions), `{train,val}2014/COCO_{train,val}2014_%012d.jpg`. The test splits have no answers and are not
read. Sources: visualqa.org/download.html, okvqa.allenai.org/download.html.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord, raise_all
from ftlib.data.sources.base import (
    JsonTable,
    NumberedFile,
    RowParser,
    RowReader,
    invalid,
    most_frequent,
    read_tables,
    require_text,
)
from ftlib.data.sources.json_stream import stream_lists
from ftlib.data.sources.records import (
    Types,
    align_predictions,
    check_records,
    format_ids,
    index_by_id,
    match_ids,
    read_large_json,
    read_records,
    require_fields,
    require_parsed,
    shown_id,
)
from ftlib.data.sources.release_files import OfficialSplit, ReleaseFiles, find, find_release_files, image_dir
from ftlib.errors import UserError
from ftlib.metrics import vqa_accuracy
from ftlib.metrics.base import MetricResult
from ftlib.metrics.vqa_accuracy import MIN_VQA_ANSWERS

_YEARS: dict[OfficialSplit, str] = {"train": "train2014", "valid": "val2014"}
_RELEASES: list[ReleaseFiles] = [
    {part: f"{version}OpenEnded_mscoco_{year}_questions.json" for part, year in _YEARS.items()}
    for version in ("v2_", "")
]
_FACTS = ("question_id", "image_id", "question_type", "answer_type")


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads.

    Raises:
        UserError: a split has questions without annotations, or there are no files.
    """
    asked, answered = _files(data)
    return [*asked.values(), *answered.values()]


@register_source(name="vqav2")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each question; the suffix is the most frequent answer, references are all (ten) answers.

    Raises:
        UserError: missing files, files that are not such JSON.
    """
    reading = RowReader()
    asked, answered = _files(data)
    for part in asked:
        year = _YEARS[part]
        pictures = f"{image_dir(Path(data.root), year)}/COCO_{year}_"
        yield from _read_split(reading, part, pictures, asked[part], answered[part])


def _files(data: Data) -> tuple[dict[OfficialSplit, Path], dict[OfficialSplit, Path]]:
    """Return the files of questions and of annotations of each split."""
    root = Path(data.root)
    asked = find_release_files(data, [[release] for release in _RELEASES])
    release = next(release for release in _RELEASES if next(iter(asked.values())).name in release.values())
    answered: dict[OfficialSplit, Path] = {}
    for part, name in release.items():
        other = name.replace("OpenEnded_", "").replace("_questions", "_annotations")
        found = find(root, other)
        if (found is None) != (part not in asked):
            missing = other if found is None else name
            raise UserError(f"{root}: {missing} is missing", "A split needs questions and annotations.")
        if found:
            answered[part] = found
    return asked, answered


def _read_split(
    reading: RowReader, part: OfficialSplit, pictures: str, questions_file: Path, annotations_file: Path
) -> Iterator[Example | InvalidRecord]:
    questions = JsonTable("question", _question)
    yield from read_tables(questions_file, {"questions": questions})
    answers = ((number, record) for _, number, record in stream_lists(annotations_file, ["annotations"]))
    yield from reading.rows(
        NumberedFile(annotations_file, "annotation"), answers, _parser(part, pictures, questions.values)
    )
    for key in questions.values:
        yield invalid(
            f"{questions_file}: question_id {str(key)[:50]}", f"{annotations_file.name} has no annotation for it"
        )


def _question(record: dict[str, Any]) -> tuple[Any, VqaQuestion]:
    question = parse_question(record)
    return question.question_id, question


def _parser(part: OfficialSplit, pictures: str, questions: dict[Any, VqaQuestion]) -> RowParser:
    """Return a function that parses an annotation into a row; it removes the question from `questions`."""
    ids = match_ids(map(str, questions), questions)

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        annotation = parse_annotation(record)
        key = annotation.question_id
        question = questions.pop(key if key in questions else ids.get(str(key)), None)
        if question is None:
            raise ValueError(f"question_id {shown_id(key)}: no such question, or a duplicate annotation")
        image = question.image_id if annotation.image_id is None else annotation.image_id
        if question.image_id is not None and str(question.image_id) != str(image):
            raise ValueError(f"field image_id: {image!r}, but the question is about {question.image_id!r}")
        if not str(image).isdecimal():
            raise ValueError(f"field image_id: must be the number of a COCO image, got {image!r}"[:200])
        known = {name: getattr(annotation, name) for name in _FACTS} | {"image_id": image}
        facts = {name: value for name, value in known.items() if value is not None} | {"question": question.question}
        name = f"{pictures}{int(str(image)):012d}.jpg"
        row = Example(
            str(key), name, question.question, _most_frequent_answer(annotation), annotation.answers, facts, part
        )
        return [replace(row, part_name=_YEARS[part])]

    return parse


def _most_frequent_answer(annotation: Annotation) -> str:
    """Return the most frequent answer; of several, the first."""
    best = annotation.multiple_choice_answer
    name = "answers" if best is None else "multiple_choice_answer"
    return require_text(most_frequent(annotation.answers) if best is None else best, name)


# VQAv2's questions, annotations and result files (also OK-VQA's and, converted, TextVQA's and VizWiz').
#
# Release: `{"questions": [{"question_id", "image_id", "question"}]}` and `{"annotations": [{"question_id", "image_id",
# "question_type", "answer_type", "answers": [{"answer", …}], "multiple_choice_answer"}]}`, the latter missing for test
# splits. Results: `[{"question_id", "answer"}]`. Of annotations only `question_id` and `answers` are needed, which may
# be texts, too. Ids are compared as they are written. Source: visualqa.org/vqa_v2_teaser.html,
# visualqa.org/evaluation.html.

Id = int | str
_ID: tuple[type, ...] = (int, str)
_QUESTION: Types = {"question_id": _ID, "question": str}
_ANNOTATION: Types = {"question_id": _ID, "answers": list}
_OPTIONAL: Types = {"image_id": _ID, "question_type": str, "answer_type": str}
_NEEDED = "vqa needs two reference files: the questions and the annotations of the same split"


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """A question and its image, or None if the file has no image."""

    question_id: Id
    image_id: Id | None
    question: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """The answers to a question.

    Attributes:
        image_id, question_type, answer_type: None if the release has none.
        answers: one of each annotator, unchanged, at least one.
        multiple_choice_answer: the most frequent answer; None if the release has none.
    """

    question_id: Id
    image_id: Id | None
    question_type: str | None
    answer_type: str | None
    answers: tuple[str, ...]
    multiple_choice_answer: str | None


def read_questions(path: Path) -> list[VqaQuestion]:
    """Read a file of questions.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    return _questions(path, _read(path))


def read_annotations(path: Path) -> list[Annotation]:
    """Read a file of annotations.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    return _annotations(path, _read(path))


def read_results(path: Path) -> dict[Id, str]:
    """Read a result file: question ID → answer.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    records = index_by_id(path, read_records(path, {"question_id": _ID, "answer": str}), "question_id")
    return {key: record["answer"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path) -> MetricResult:
    """Return the VQA accuracy of a result file.

    Args:
        references: the questions and the annotations of the split, in either order.

    Raises:
        UserError: malformed files, or different questions in the three files.
    """
    questions, annotations, path = _read_references(references)
    if few := [key for key, one in annotations.items() if len(one.answers) < MIN_VQA_ANSWERS]:
        problem = (
            f"{len(few)} of {len(annotations)} questions have fewer than {MIN_VQA_ANSWERS} answers: {format_ids(few)}"
        )
        remedy = "VQA accuracy needs answers of several annotators, usually ten; `ftlib score text` compares with one."
        raise UserError(f"{path}: {problem}, so that even a correct answer scores below 100 %", remedy)
    answers = align_predictions(predictions, read_results(predictions), annotations, "question_id")
    found = vqa_accuracy.measure(
        [answers[key] for key in annotations],
        [one.answers for one in annotations.values()],
        [_image(questions[key], one) for key, one in annotations.items()],
        _breakdowns(list(annotations.values())),
    )
    return replace(found, answers=[{"prediction": text} for text in answers.values()])


def _breakdowns(annotations: Sequence[Annotation]) -> dict[str, list[str]]:
    """Return the breakdowns for which every annotation has a value."""
    known = {
        "answer type": [one.answer_type for one in annotations],
        "question type": [one.question_type for one in annotations],
    }
    told = {name: [kind for kind in kinds if kind is not None] for name, kinds in known.items()}
    return {name: kinds for name, kinds in told.items() if len(kinds) == len(annotations)}


def _image(question: VqaQuestion, annotation: Annotation) -> Hashable:
    """Return the group for resampling: the image, or the question if its image is unknown."""
    image = question.image_id if annotation.image_id is None else annotation.image_id
    return ("question", question.question_id) if image is None else image


def _read_references(paths: Sequence[Path]) -> tuple[dict[Id, VqaQuestion], dict[Id, Annotation], Path]:
    """Return questions and annotations by question ID, in the order of the annotations, and the annotations file."""
    if len(paths) != 2:
        raise UserError(f"{_NEEDED}; got {len(paths)}")
    contents = [_read(path) for path in paths]
    if "annotations" in contents[0]:
        paths, contents = paths[::-1], contents[::-1]
    if "questions" not in contents[0] or "annotations" not in contents[1]:
        raise UserError(_NEEDED, "Test splits have no annotations: their results go to the challenge's server.")
    questions = {question.question_id: question for question in _questions(paths[0], contents[0])}
    annotations = {one.question_id: one for one in _annotations(paths[1], contents[1])}
    return questions, align_predictions(paths[1], annotations, questions, "question_id"), paths[1]


def _read(path: Path) -> dict[str, Any]:
    content = read_large_json(path, "answers", parse_annotation)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object with `questions` or `annotations`")
    return content


def parse_question(record: dict[str, Any]) -> VqaQuestion:
    """Parse a question of the release.

    Raises:
        ValueError: the record is invalid.
    """
    require_fields(record, _with_optional(record, _QUESTION))
    return VqaQuestion(record["question_id"], record.get("image_id"), record["question"])


def parse_annotation(record: dict[str, Any]) -> Annotation:
    """Parse an annotation of the release.

    Raises:
        ValueError: the record is invalid.
    """
    require_fields(record, _with_optional(record, _ANNOTATION))
    best = record.get("multiple_choice_answer")
    asked, answered = (record.get(name) for name in ("question_type", "answer_type"))
    return Annotation(
        record["question_id"],
        record.get("image_id"),
        None if asked is None else sys.intern(asked),
        None if answered is None else sys.intern(answered),
        _answers(record["answers"]),
        best if isinstance(best, str) else None,
    )


def _with_optional(record: dict[str, Any], needed: Types) -> Types:
    return needed | {name: kind for name, kind in _OPTIONAL.items() if record.get(name) is not None}


def _answers(records: list[Any]) -> tuple[str, ...]:
    """Return the texts of answers, which are records or texts.

    The official program compares an answer with all records that are not equal to its own record, so equal answer_ids
    would change the score. They are an error, and records without an answer_id count as different.
    """
    if records and all(isinstance(record, str) for record in records):
        return tuple(map(sys.intern, records))
    try:
        texts = tuple([sys.intern(record["answer"]) for record in records])
        known = [record["answer_id"] for record in records if "answer_id" in record]
        distinct = len(set(known))
    except (KeyError, TypeError):
        raise ValueError(
            "field answers: must be texts, or objects with a text `answer` (and a plain `answer_id`)"
        ) from None
    if not texts:
        raise ValueError("field answers: is empty")
    if distinct < len(known):
        raise ValueError("field answers: duplicate answer_id")
    return texts


def _questions(path: Path, content: dict[str, Any]) -> list[VqaQuestion]:
    records = _list(path, content, "questions")
    check_records(path, records, _QUESTION, "question")
    index_by_id(path, records, "question_id")
    faults, found = [], []
    for number, record in enumerate(records, 1):
        try:
            found.append(parse_question(record))
        except ValueError as error:
            faults.append(f"{path}: question {number}: {error}")
    raise_all(faults, "Fix the file; nothing was scored.")
    return found


def _annotations(path: Path, content: dict[str, Any]) -> list[Annotation]:
    records = _list(path, content, "annotations")
    require_parsed(path, enumerate(records, 1), Annotation, "annotation")
    if not records:
        raise UserError(f"{path}: contains no annotations")
    index_by_id(path, ({"question_id": one.question_id} for one in records), "question_id")
    return records


def _list(path: Path, content: dict[str, Any], name: str) -> list[Any]:
    records = content.get(name)
    if not isinstance(records, list):
        raise UserError(f"{path}: must have a list `{name}`")
    return records
