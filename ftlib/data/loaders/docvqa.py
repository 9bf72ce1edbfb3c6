"""DocVQA's training and validation questions → rows of parts train and valid.

Files below `data.root`, with or without a folder around them: `{train,val}_v1.0_withQT.json` (with question types)
or `{train,val}_v1.0.json`, pages in `documents/` (in newer downloads `spdocvqa_images/`), or in such folders below
`train/` and `val/`. The test split has no answers and is left out. Source: rrc.cvc.uab.es, challenge 17, task 1, whose
advice it is to train on the first answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.layout import Part, choose, folder_of, picture
from ftlib.data.loaders.rows import Numbered, Parse, Reading, needed
from ftlib.data.official.docvqa import parse_question
from ftlib.data.official.streaming import stream_lists

_PARTS: dict[Part, str] = {"train": "train", "valid": "val"}
_FILES: list[list[list[dict[Part, str]]]] = [
    [[{part: f"{name}_v1.0_withQT.json"}], [{part: f"{name}_v1.0.json"}]] for part, name in _PARTS.items()
]
PAGES = ("documents", "spdocvqa_images")


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: none is there, or those of several releases.
    """
    return list(choose(data, *_FILES).values())


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each question; its suffix is the first answer, its references are all; a document is a group.

    Raises:
        UserError: missing files, files that are no such JSON.
    """
    root, reading = Path(data.root), Reading()
    for part, path in choose(data, *_FILES).items():
        pages = _pages(root, path, _PARTS[part])
        records = ((number, record) for _, number, record in stream_lists(path, ["data"]))
        yield from reading.rows(Numbered(path, "question"), records, _parser(part, pages))


def _pages(root: Path, path: Path, split: str) -> str:
    """The folder of a part's pages: beside the questions, or in the folder of its split, or the one of all."""
    for folder in [above / name for above in (path.parent, root / split) for name in PAGES]:
        if folder.is_dir():
            return folder.relative_to(root).as_posix()
    return folder_of(root, *PAGES)


def _parser(part: Part, folder: str) -> Parse:
    def parse(record: dict[str, Any], number: int) -> list[Example]:
        question = parse_question(record)
        if not question.answers:
            raise ValueError("field answers: is missing or empty")
        facts: dict[str, Any] = {"questionId": question.question_id, "docId": question.document}
        facts["question"] = question.question
        if "question_types" in record:
            facts["question_types"] = list(question.types)
        image = picture(folder, question.image.removeprefix(f"{PAGES[0]}/"))
        suffix, group = needed(question.answers[0], "answers"), str(question.document)
        key = str(question.question_id)
        return [Example(key, image, question.question, suffix, question.answers, facts, part, group)]

    return parse
