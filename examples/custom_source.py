"""A data source of its own: a text file of questions and answers.

    Q: What is the capital of France?
    A: Paris

Blocks are separated by blank lines. Used by examples/custom_source.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.errors import UserError


def files(data: Data) -> list[Path]:
    """The annotation files; ftlib prepares the data again when their content changes."""
    return [Path(data.root) / (data.file or "questions.txt")]


@register_source(name="questions", title="questions and answers in a text file")
def examples(data: Data) -> Iterator[Example | InvalidRecord]:
    """The rows of the file, one after the other. Faulty blocks are yielded, too: ftlib prepare lists all of them."""
    (path,) = files(data)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", "Check data.root and data.file.") from None
    for blank, block in groupby(enumerate(lines, 1), key=lambda line: not line[1].strip()):
        if not blank:
            numbered = list(block)
            yield _example([text for _, text in numbered], f"{path}:{numbered[0][0]}")


def _example(block: list[str], location: str) -> Example | InvalidRecord:
    if len(block) != 2 or not (block[0].startswith("Q: ") and block[1].startswith("A: ")):
        return InvalidRecord(location, "a block has one line that begins with 'Q: ' and one that begins with 'A: '")
    return Example(id="", image="", prefix=block[0][3:], suffix=block[1][3:], location=location)
