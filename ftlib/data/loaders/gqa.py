"""GQA's questions → rows of parts train, valid (val) and test (testdev).

Files below `data.root`, with or without their zips' folders: `train_balanced_questions.json` or the folder
`train_all_questions/` of chunks, `{val,testdev}_{all,balanced}_questions.json`, `images/<id>.jpg`. The test and
challenge splits have no answers and are left out. Source: cs.stanford.edu/people/dorarad/gqa/download.html.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.layout import Part, Variant, choose, folder_of, picture
from ftlib.data.loaders.rows import Numbered, Parse, Reading, needed
from ftlib.data.official.gqa import parse_question
from ftlib.data.official.streaming import stream_members
from ftlib.errors import UserError

_PARTS: dict[Part, str] = {"valid": "val", "test": "testdev"}
_WHICH = ("all", "balanced")
_FACTS = ("question", "isBalanced", "types", "groups", "entailed", "semantic")


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: none is there, or those of several releases.
    """
    return [chunk for path in _paths(data).values() for chunk in _chunks(path)]


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each question, with all other fields of the release as facts.

    Part train: the balanced questions, or all with `data.balanced: false`. The others: the balanced questions and,
    where the file of all questions is there, those that they entail: without their answers there is no consistency.

    Raises:
        UserError: missing files, files that are no such JSON.
    """
    root, reading = Path(data.root), Reading()
    images = folder_of(root, "images")
    for part, path in _paths(data).items():
        whole = part == "train" and not data.balanced
        for chunk in _chunks(path):
            asked_for = set() if part == "train" else _entailed(chunk)
            records = enumerate(_records(chunk), 1)
            yield from reading.rows(Numbered(chunk, "question"), records, _parser(part, images, whole, asked_for))


def _paths(data: Data) -> dict[Part, Path]:
    """part → file, or folder of chunks."""
    everything: list[Variant] = [{"train": "train_all_questions"}]
    balanced: list[Variant] = [{"train": "train_balanced_questions.json"}]
    train = [balanced, everything] if data.balanced else [everything]
    others = [[[{part: f"{name}_{which}_questions.json"}] for which in _WHICH] for part, name in _PARTS.items()]
    return choose(data, train, *others)


def _chunks(path: Path) -> list[Path]:
    chunks = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not chunks:
        raise UserError(f"{path}: no JSON files in this folder")
    return chunks


def _entailed(path: Path) -> set[str]:
    """The questions that follow from balanced ones."""
    found: set[str] = set()
    for _, record in stream_members(path):
        if isinstance(record, dict) and record.get("isBalanced") is True and isinstance(record.get("entailed"), list):
            found.update(one for one in record["entailed"] if isinstance(one, str))
    return found


def _records(path: Path) -> Iterator[Any]:
    for key, record in stream_members(path):
        yield {**record, "questionId": key} if isinstance(record, dict) else record


def _parser(part: Part, images: str, whole: bool, asked_for: Collection[str]) -> Parse:
    """Question → row.

    Args:
        whole: every question is wanted, not only those that are balanced.
        asked_for: ids of further questions that are wanted.
    """

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        question, key = parse_question(record), record["questionId"]
        if not (whole or question.balanced or key in asked_for):
            return []
        facts = {name: record[name] for name in _FACTS if name in record}
        answer = needed(question.answer, "answer")
        return [Example(key, picture(images, f"{question.image}.jpg"), question.question, answer, (), facts, part)]

    return parse
