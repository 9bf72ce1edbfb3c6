"""Rows of a prepared split, read from its JSONL file when they are asked for.

Beside `train.jsonl` lies `train.offsets.npy`, where each line begins; both are mapped into memory, so that ten million
rows cost next to nothing and every data-loading worker shares them.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from ftlib.data.examples import Example


class Rows(Sequence[Example]):
    """A split's rows; slices are lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        return Example(**json.loads(self._bytes[self._offsets[number] : self._offsets[number + 1]]))

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._offsets = np.load(_offsets_of(self.path), mmap_mode="r")
        with self.path.open("rb") as file:  # an empty file cannot be mapped
            self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""


class RowWriter:
    """Writes a file that `Rows` reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q", [0])
        self._file = path.open("wb")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def write(self, record: dict[str, Any]) -> bytes:
        """Add a row; returns its line."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        return line

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            np.save(_offsets_of(self.path), np.frombuffer(self._offsets, dtype=np.int64))


def _offsets_of(path: Path) -> Path:
    return path.with_suffix(".offsets.npy")
