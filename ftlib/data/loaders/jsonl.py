"""JSONL, one object in a line: `{"image": …, "prefix": …, "suffix": …}`, under these names or those of `data.columns`.

The image's path is relative to `data.root`. `prefix` may be empty: then the prompt comes from the config. With
`"references": […]` an answer is judged against all of these. Any other field is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.fields import row_parser
from ftlib.data.loaders.lines import read_json_lines
from ftlib.data.loaders.rows import Numbered, Reading


def files(data: Data) -> list[Path]:
    """The annotation file that `examples` reads, data.jsonl if `data.file` names none."""
    return [Path(data.root) / (data.file or "data.jsonl")]


def examples(data: Data) -> Iterator[Example | Bad]:
    """The rows of `data.file` (default data.jsonl).

    Raises:
        UserError: missing or unreadable file.
    """
    (path,) = files(data)
    return Reading().rows(Numbered(path, "line"), read_json_lines(path), row_parser(data.columns))
