"""GQA: questions as splits train, valid (val) and test (testdev).

Files in `data.root`, with or without the folders of the zips: `train_balanced_questions.json` or the folder
`train_all_questions/` of chunks, `{val,testdev}_{all,balanced}_questions.json`, `images/<id>.jpg`. The test and
challenge splits have no answers and are not read. Source: cs.stanford.edu/people/dorarad/gqa/download.html.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import NumberedFile, RowParser, RowReader, require_text
from ftlib.data.sources.json_stream import stream_members
from ftlib.data.sources.records import (
    format_ids,
    index_by_id,
    read_large_json,
    read_records,
    require_fields,
    require_parsed,
    require_same_ids,
)
from ftlib.data.sources.release_files import OfficialSplit, ReleaseFiles, find_release_files, image_dir, image_name
from ftlib.errors import UserError
from ftlib.metrics import gqa as metrics_gqa
from ftlib.metrics.base import MetricResult
from ftlib.metrics.gqa import GqaChoices, GqaQuestion

_PARTS: dict[OfficialSplit, str] = {"valid": "val", "test": "testdev"}
_WHICH = ("all", "balanced")
NOT_EVALUATED = "questions that are not balanced, nor follow from those that are"
_FACTS = ("question", "isBalanced", "types", "groups", "entailed", "semantic")


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads.

    Raises:
        UserError: there are none, or files of several releases.
    """
    return [chunk for path in _paths(data).values() for chunk in _chunks(path)]


@register_source(name="gqa")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each question, with all other fields of the release as facts.

    Train has the balanced questions, or all with `data.balanced: false`. The other splits have the balanced questions
    and, if the file of all questions exists, those that they entail, which the metric "consistency" needs.

    Raises:
        UserError: missing files, files that are not such JSON.
    """
    return _read(data, Counter())


def skipped_counts(data: Data) -> dict[str, int]:
    """Return reason → number of rows that `examples` skips. Reads the whole source again.

    Raises:
        UserError: as `examples`.
    """
    counts = Counter({NOT_EVALUATED: 0})
    for _ in _read(data, counts):
        pass
    return dict(counts)


def _read(data: Data, counts: Counter[str]) -> Iterator[Example | InvalidRecord]:
    root, reading = Path(data.root), RowReader()
    images = image_dir(root, "images")
    for part, path in _paths(data).items():
        whole = part == "train" and not data.balanced
        for chunk in _chunks(path):
            asked_for = set() if part == "train" else _entailed(chunk)
            records = enumerate(_records(chunk), 1)
            parse = _parser(part, images, whole, asked_for, counts)
            yield from reading.rows(NumberedFile(chunk, "question"), records, parse)


def _paths(data: Data) -> dict[OfficialSplit, Path]:
    """Return split → file, or folder of chunks."""
    everything: list[ReleaseFiles] = [{"train": "train_all_questions"}]
    balanced: list[ReleaseFiles] = [{"train": "train_balanced_questions.json"}]
    train = [balanced, everything] if data.balanced else [everything]
    others = [[[{part: f"{name}_{which}_questions.json"}] for which in _WHICH] for part, name in _PARTS.items()]
    return find_release_files(data, train, *others)


def _chunks(path: Path) -> list[Path]:
    chunks = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not chunks:
        raise UserError(f"{path}: no JSON files in this folder")
    return chunks


def _entailed(path: Path) -> set[str]:
    """Return the IDs of questions that balanced questions entail."""
    found: set[str] = set()
    for _, record in stream_members(path):
        if isinstance(record, dict) and record.get("isBalanced") is True and isinstance(record.get("entailed"), list):
            found.update(one for one in record["entailed"] if isinstance(one, str))
    return found


def _records(path: Path) -> Iterator[Any]:
    for key, record in stream_members(path):
        yield {**record, "questionId": key} if isinstance(record, dict) else record


def _parser(
    part: OfficialSplit, images: str, whole: bool, asked_for: Collection[str], counts: Counter[str]
) -> RowParser:
    """Return a function that parses a question into a row.

    Args:
        whole: whether to use every question, not only balanced ones.
        asked_for: IDs of further questions to use.
        counts: counter of skipped rows by reason.
    """

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        question, key = parse_question(record), record["questionId"]
        if not (whole or question.balanced or key in asked_for):
            counts[NOT_EVALUATED] += 1
            return []
        facts = {name: record[name] for name in _FACTS if name in record}
        answer = require_text(question.answer, "answer")
        row = Example(key, image_name(images, f"{question.image}.jpg"), question.question, answer, (), facts, part)
        return [replace(row, part_name=_PARTS.get(part, part))]

    return parse


# GQA's questions, choices and predictions.
#
# Release: question id → `{"question", "imageId", "isBalanced", "answer", "types", "groups", "entailed", "semantic", …}`
# in one file or, where that would be too large, in a folder of chunks; the test splits have only the first three
# fields. Choices: question id → `{"valid", "plausible"}`. Predictions: `[{"questionId", "prediction"}]`. Source:
# cs.stanford.edu/people/dorarad/gqa/download.html, evaluate.html.

Parsed = TypeVar("Parsed")


def read_questions(path: Path) -> dict[str, GqaQuestion]:
    """Read the questions of a split: question ID → question.

    Args:
        path: one JSON file, or a folder of chunks (`train_all_questions/`).

    Raises:
        UserError: malformed files, or question ids in two chunks.
    """
    return _read_by_id(path, "imageId", parse_question, GqaQuestion, "question")


def read_choices(path: Path) -> dict[str, GqaChoices]:
    """Read the choices of a split: question ID → choices.

    Args:
        path: one JSON file, or a folder of chunks (`train_choices/`).

    Raises:
        UserError: malformed files, or question ids in two chunks.
    """
    return _read_by_id(path, "valid", _choices, GqaChoices, "choices of question")


def read_results(path: Path) -> dict[str, str]:
    """Read predictions: question ID → answer. IDs that are numbers become text.

    Raises:
        UserError: the file is malformed, or question IDs are not unique.
    """
    records = read_records(path, {"questionId": (str, int), "prediction": str})
    named = [{**record, "questionId": str(record["questionId"])} for record in records]
    return {key: record["prediction"] for key, record in index_by_id(path, named, "questionId").items()}


def score(references: Sequence[Path], predictions: Path, choices: Path | None = None) -> MetricResult:
    """Return GQA's metrics of a prediction file.

    Args:
        references: the split's questions, one file or one folder of chunks; consistency needs all questions.
        choices: the split's choices, for validity and plausibility.

    Raises:
        UserError: malformed files, balanced questions without a prediction or choices, or unknown questions.
    """
    if len(references) != 1:
        raise UserError(f"gqa needs one file (or folder of chunks) of questions; got {len(references)}")
    questions = read_questions(references[0])
    balanced = {key for key, question in questions.items() if question.balanced}
    if not balanced:
        raise UserError(f"{references[0]}: contains no balanced questions")
    if without := [key for key in balanced if not questions[key].answer]:
        problem = f"{references[0]}: {len(without)} balanced questions have no answer: {format_ids(without)}"
        raise UserError(problem, "The test splits' predictions go to the challenge's server.")
    answers = read_results(predictions)
    require_same_ids(predictions, answers, balanced | (answers.keys() & questions.keys()), "questionId")
    found = read_choices(choices) if choices else None
    if found is not None and (absent := balanced - found.keys()):
        raise UserError(f"{choices}: no choices for {len(absent)} questions: {format_ids(absent)}")
    asked = [{"prediction": answers[key]} for key in questions if key in balanced]
    return replace(metrics_gqa.measure(questions, answers, found), answers=asked)


def _read_by_id(
    path: Path, field: str, parse: Callable[[dict[str, Any]], Parsed], kind: type[Parsed], what: str
) -> dict[str, Parsed]:
    """Return ID → record, from one file or all files of a folder."""
    chunks = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not chunks:
        raise UserError(f"{path}: no JSON files in this folder")
    found: dict[str, Parsed] = {}
    for chunk in chunks:
        records = _read_chunk(chunk, field, parse)
        require_parsed(chunk, records.items(), kind, what)
        if twice := found.keys() & records.keys():
            raise UserError(f"{chunk}: questions that another chunk also has: {format_ids(twice)}")
        found |= records
    return found


def _read_chunk(path: Path, field: str, parse: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    records = read_large_json(path, field, parse)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path}: must be an object with question ids as keys")
    return records


def parse_question(record: dict[str, Any]) -> GqaQuestion:
    """Parse a question.

    Raises:
        ValueError: the record is invalid.
    """
    require_fields(record, {"question": str, "imageId": str, "isBalanced": bool})
    text, image, balanced = record["question"], sys.intern(record["imageId"]), record["isBalanced"]
    if "answer" not in record:
        return GqaQuestion(text, "", image, balanced, (), None, "", "", "", 0)
    require_fields(record, {"answer": str, "types": dict, "groups": dict, "entailed": list, "semantic": list})
    require_fields(record["types"], {"structural": str, "semantic": str, "detailed": str})
    require_fields(record["groups"], {"global": (str, type(None))})
    types = record["types"]
    return GqaQuestion(
        text,
        sys.intern(record["answer"]),
        image,
        balanced,
        _texts("entailed", record["entailed"]),
        record["groups"].get("global"),
        sys.intern(types["structural"]),
        sys.intern(types["semantic"]),
        sys.intern(types["detailed"]),
        metrics_gqa.count_steps(map(_operation, record["semantic"])),
    )


def _operation(step: Any) -> tuple[str, str]:
    if not isinstance(step, dict):
        raise ValueError(f"field semantic: objects expected, found {step!r}"[:200])
    require_fields(step, {"operation": str, "argument": str})
    return step["operation"], step["argument"]


def _choices(record: dict[str, Any]) -> GqaChoices:
    """Parse the choices of a question.

    Raises:
        ValueError: they are invalid.
    """
    require_fields(record, {"valid": list, "plausible": list})
    return GqaChoices(_texts("valid", record["valid"]), _texts("plausible", record["plausible"]))


def _texts(name: str, values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name}: a list of texts expected, found {values!r}"[:200])
    return tuple(map(sys.intern, values))
