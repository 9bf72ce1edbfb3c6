"""JSONL, one object per line: `{"image": …, "prefix": …, "suffix": …}`, with these names or those in `data.columns`.
A JSON list of such objects is read, too, with any file name.

The image's path is relative to `data.root`. `prefix` may be empty, or missing if `data.prompt` does not use it. With
`"references": […]`, an answer is compared with all of these. `"part": …` or `"split": …` is the split of the row, see
`split_names`. Other fields become facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.annotations import annotation_paths, chunks_of, read_files
from ftlib.data.sources.base import row_parser
from ftlib.data.sources.image_references import ImageLocator
from ftlib.data.sources.json_stream import FileChunk, read_records
from ftlib.data.split_names import SplitNames


def files(data: Data) -> list[Path]:
    """Return the annotation files that `examples` reads; default: data.jsonl."""
    return annotation_paths(data, "data.jsonl")


def chunks(data: Data) -> list[FileChunk]:
    """Return the rows in chunks for several processes; empty if they must be read sequentially.

    With `data.files` they are read sequentially: a file's first image determines the folder of the others.

    Raises:
        UserError: as `examples`.
    """
    return [] if data.files else chunks_of(data, "data.jsonl")


@register_source(name="jsonl")
@register_source(name="digits")
@register_source(name="digits_detect")
def examples(
    data: Data, splits: SplitNames | None = None, chunk: FileChunk | None = None
) -> Iterator[Example | InvalidRecord]:
    """Yield the rows of `data.file` (default data.jsonl), or of all `data.files`.

    Raises:
        UserError: as `annotations.read_files`.
    """
    return _read(data, splits, chunk, may_be_empty=False)


def detect(
    data: Data, splits: SplitNames | None = None, chunk: FileChunk | None = None
) -> Iterator[Example | InvalidRecord]:
    """As `examples`, but an empty answer is valid: the image contains no such object.

    Raises:
        UserError: as `examples`.
    """
    return _read(data, splits, chunk, may_be_empty=True)


def _read(
    data: Data, splits: SplitNames | None, chunk: FileChunk | None, may_be_empty: bool
) -> Iterator[Example | InvalidRecord]:
    parser = partial(row_parser, data.columns, data.prompt, ImageLocator(data), may_be_empty=may_be_empty)
    return read_files(
        data, splits, ("data.jsonl",), lambda path: read_records(path, data.encoding, chunk), parser, chunk
    )
