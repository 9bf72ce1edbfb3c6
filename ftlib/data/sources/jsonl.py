"""JSONL, one object in a line: `{"image": …, "prefix": …, "suffix": …}`, under these names or those of `data.columns`.
A JSON list of such objects is read, too, whatever the file is called.

The image's path is relative to `data.root`. `prefix` may be empty, or missing where `data.prompt` does not name it.
With `"references": […]` an answer is judged against all of these. `"part": …` or `"split": …` says which split a row
belongs to, see `split_names`. Any other field is kept.
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
from ftlib.data.sources.json_stream import FileChunk, read_records
from ftlib.data.split_names import SplitNames


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads, data.jsonl if the config names none."""
    return annotation_paths(data, "data.jsonl")


def chunks(data: Data) -> list[FileChunk]:
    """The rows in stretches, for several processes to read; none if they must be read from the beginning.

    Of `data.files`, a file's first image tells where the others lie.

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
    """The rows of `data.file` (default data.jsonl), or of all `data.files`.

    Raises:
        UserError: as `annotations.read_files`.
    """
    return _read(data, splits, chunk, may_be_empty=False)


def detect(
    data: Data, splits: SplitNames | None = None, chunk: FileChunk | None = None
) -> Iterator[Example | InvalidRecord]:
    """As `examples`; an empty answer says that nothing of what is asked for is in the image.

    Raises:
        UserError: as `examples`.
    """
    return _read(data, splits, chunk, may_be_empty=True)


def _read(
    data: Data, splits: SplitNames | None, chunk: FileChunk | None, may_be_empty: bool
) -> Iterator[Example | InvalidRecord]:
    parser = partial(row_parser, data.columns, data.prompt, may_be_empty=may_be_empty)
    return read_files(
        data, splits, ("data.jsonl",), lambda path: read_records(path, data.encoding, chunk), parser, chunk
    )
