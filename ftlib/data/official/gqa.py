"""GQA's questions, choices and predictions.

Release: question id → `{"question", "imageId", "isBalanced", "answer", "types", "groups", "entailed", "semantic", …}`
in one file or, where that would be too large, in a folder of chunks; the test splits have only the first three fields.
Choices: question id → `{"valid", "plausible"}`. Predictions: `[{"questionId", "prediction"}]`.
Source: cs.stanford.edu/people/dorarad/gqa/download.html, evaluate.html.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ftlib.data.official.large import read_large_json, repeated_keys, require_parsed
from ftlib.data.official.results import by_id, name_ids, read_records, require_fields, require_same_ids
from ftlib.errors import UserError
from ftlib.metrics import gqa
from ftlib.metrics.gqa import Choices, Question
from ftlib.metrics.totals import Measured

Parsed = TypeVar("Parsed")


def read_questions(path: Path) -> dict[str, Question]:
    """Read the questions of a split: question id → question.

    Args:
        path: one JSON file, or a folder of chunks (`train_all_questions/`).

    Raises:
        UserError: malformed files, or question ids in two chunks.
    """
    return _read_by_id(path, "imageId", parse_question, Question, "question")


def read_choices(path: Path) -> dict[str, Choices]:
    """Read the choices of a split: question id → choices.

    Args:
        path: one JSON file, or a folder of chunks (`train_choices/`).

    Raises:
        UserError: malformed files, or question ids in two chunks.
    """
    return _read_by_id(path, "valid", _choices, Choices, "choices of question")


def read_results(path: Path) -> dict[str, str]:
    """Read predictions: question id → answer.

    Raises:
        UserError: the file is malformed, or question ids occur twice.
    """
    records = by_id(path, read_records(path, {"questionId": str, "prediction": str}), "questionId")
    return {key: record["prediction"] for key, record in records.items()}


def score(references: Sequence[Path], predictions: Path, choices: Path | None = None) -> Measured:
    """GQA's metrics of a prediction file.

    Args:
        references: the split's questions, one file or one folder of chunks; all questions if consistency is wanted.
        choices: the split's choices, for validity and plausibility.

    Raises:
        UserError: malformed files, balanced questions without a prediction or choices, or unknown questions.
    """
    if len(references) != 1:
        raise UserError(f"gqa needs one file (or folder of chunks) of questions; got {len(references)}")
    questions = read_questions(references[0])
    balanced = {key for key, question in questions.items() if question.balanced}
    if not balanced:
        raise UserError(f"{references[0]}: no balanced questions in it")
    if without := [key for key in balanced if not questions[key].answer]:
        problem = f"{references[0]}: {len(without)} balanced questions have no answer: {name_ids(without)}"
        raise UserError(problem, "The test splits' predictions go to the challenge's server.")
    answers = read_results(predictions)
    require_same_ids(predictions, answers, balanced | (answers.keys() & questions.keys()), "questionId")
    found = read_choices(choices) if choices else None
    if found is not None and (absent := balanced - found.keys()):
        raise UserError(f"{choices}: no choices for {len(absent)} questions: {name_ids(absent)}")
    return gqa.measure(questions, answers, found)


def _read_by_id(
    path: Path, field: str, parse: Callable[[dict[str, Any]], Parsed], kind: type[Parsed], what: str
) -> dict[str, Parsed]:
    """Records under their ids, from one file or all files of a folder."""
    chunks = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not chunks:
        raise UserError(f"{path}: no JSON files in this folder")
    found: dict[str, Parsed] = {}
    for chunk in chunks:
        records = _read_chunk(chunk, field, parse)
        require_parsed(chunk, records.items(), kind, what)
        if twice := found.keys() & records.keys():
            raise UserError(f"{chunk}: questions that another chunk has already: {name_ids(twice)}")
        found |= records
    return found


def _read_chunk(path: Path, field: str, parse: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    seen = 0

    def counted(record: dict[str, Any]) -> Any:
        nonlocal seen
        seen += 1
        return parse(record)

    records = read_large_json(path, field, counted)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path}: an object with question ids as keys is needed")
    if seen > len(records) and (twice := repeated_keys(path)):
        raise UserError(f"{path}: question ids occur more than once: {name_ids(twice)}", "Keep one of each.")
    return records


def parse_question(record: dict[str, Any]) -> Question:
    """Parse a question.

    Raises:
        ValueError: what is wrong with it.
    """
    require_fields(record, {"question": str, "imageId": str, "isBalanced": bool})
    text, image, balanced = record["question"], sys.intern(record["imageId"]), record["isBalanced"]
    if "answer" not in record:
        return Question(text, "", image, balanced, (), None, "", "", "", 0)
    require_fields(record, {"answer": str, "types": dict, "groups": dict, "entailed": list, "semantic": list})
    require_fields(record["types"], {"structural": str, "semantic": str, "detailed": str})
    require_fields(record["groups"], {"global": (str, type(None))})
    types = record["types"]
    return Question(
        text,
        sys.intern(record["answer"]),
        image,
        balanced,
        _texts("entailed", record["entailed"]),
        record["groups"].get("global"),
        sys.intern(types["structural"]),
        sys.intern(types["semantic"]),
        sys.intern(types["detailed"]),
        gqa.count_steps(map(_operation, record["semantic"])),
    )


def _operation(step: Any) -> tuple[str, str]:
    if not isinstance(step, dict):
        raise ValueError(f"field semantic: objects expected, found {step!r}"[:200])
    require_fields(step, {"operation": str, "argument": str})
    return step["operation"], step["argument"]


def _choices(record: dict[str, Any]) -> Choices:
    """Parse the choices of a question.

    Raises:
        ValueError: what is wrong with them.
    """
    require_fields(record, {"valid": list, "plausible": list})
    return Choices(_texts("valid", record["valid"]), _texts("plausible", record["plausible"]))


def _texts(name: str, values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name}: a list of texts expected, found {values!r}"[:200])
    return tuple(map(sys.intern, values))
