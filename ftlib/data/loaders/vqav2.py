"""VQAv2's train2014 and val2014 → rows of parts train and valid.

Files below `data.root`, with or without their zips' folders: `v2_OpenEnded_mscoco_{train,val}2014_questions.json`,
`v2_mscoco_{train,val}2014_annotations.json`, `{train,val}2014/COCO_{train,val}2014_%012d.jpg`. The test splits have no
answers and are left out. Source: visualqa.org/download.html.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.layout import Part, choose, folder_of
from ftlib.data.loaders.rows import Kept, Numbered, Parse, Reading, collect, fault, needed
from ftlib.data.official.streaming import stream_lists
from ftlib.data.official.vqa import Annotation, Question, parse_annotation, parse_question
from ftlib.errors import UserError

_YEARS: dict[Part, str] = {"train": "train2014", "valid": "val2014"}
_QUESTIONS: dict[Part, str] = {part: f"v2_OpenEnded_mscoco_{year}_questions.json" for part, year in _YEARS.items()}
_ANNOTATIONS: dict[Part, str] = {part: f"v2_mscoco_{year}_annotations.json" for part, year in _YEARS.items()}
_FACTS = ("question_id", "image_id", "question_type", "answer_type")


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: a part has questions without annotations, or none of them is there.
    """
    asked, answered = _files(data)
    return [*asked.values(), *answered.values()]


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each question; its suffix is the most frequent answer, its references are all (ten) answers.

    Raises:
        UserError: missing files, files that are no such JSON.
    """
    reading = Reading()
    asked, answered = _files(data)
    for part in asked:
        year = _YEARS[part]
        pictures = f"{folder_of(Path(data.root), year)}/COCO_{year}_"
        yield from _part(reading, part, pictures, asked[part], answered[part])


def _files(data: Data) -> tuple[dict[Part, Path], dict[Part, Path]]:
    """Questions and annotations of each part."""
    asked = choose(data, [[_QUESTIONS]])
    answered = choose(data.model_copy(update={"file": ""}), [[_ANNOTATIONS]])
    for part in _YEARS:
        if (part in asked) != (part in answered):
            missing = (_ANNOTATIONS if part in asked else _QUESTIONS)[part]
            raise UserError(f"{data.root}: {missing} is missing", "A part needs its questions and its annotations.")
    return asked, answered


def _part(reading: Reading, part: Part, pictures: str, asked: Path, answered: Path) -> Iterator[Example | Bad]:
    questions = Kept("question", _question)
    yield from collect(asked, {"questions": questions})
    answers = ((number, record) for _, number, record in stream_lists(answered, ["annotations"]))
    yield from reading.rows(Numbered(answered, "annotation"), answers, _parser(part, pictures, questions.found))
    for key in questions.found:
        yield fault(f"{asked}: question_id {str(key)[:50]}", f"{answered.name} has no annotation for it")


def _question(record: dict[str, Any]) -> tuple[Any, Question]:
    question = parse_question(record)
    return question.question_id, question


def _parser(part: Part, pictures: str, questions: dict[Any, Question]) -> Parse:
    """Annotation → row; takes the question that it answers out of `questions`."""

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        annotation = parse_annotation(record)
        key, image = annotation.question_id, annotation.image_id
        question = questions.pop(key, None)
        if question is None:
            raise ValueError(f"question_id {key}: no such question, or one that is answered already")
        if question.image_id != image or type(image) is not int:
            raise ValueError(f"field image_id: {image!r}, but the question is about {question.image_id!r}")
        facts = {name: getattr(annotation, name) for name in _FACTS} | {"question": question.question}
        name = f"{pictures}{image:012d}.jpg"
        return [Example(str(key), name, question.question, _best(annotation), annotation.answers, facts, part)]

    return parse


def _best(annotation: Annotation) -> str:
    """The most frequent answer; of several the first."""
    best = annotation.multiple_choice_answer
    name = "answers" if best is None else "multiple_choice_answer"
    return needed(Counter(annotation.answers).most_common(1)[0][0] if best is None else best, name)
