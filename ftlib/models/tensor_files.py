"""Read and write safetensors files by rows, so that only a few rows are in memory.

Files are read, not mapped into memory, but for `StoredTensor.map`: pages of mapped files would count as memory of the
process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlib.core.safetensors_header import read_safetensors_header
from ftlib.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read as a matrix: first dimension × all others."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` in the stored dtype, shape (rows, columns).

        Raises:
            UserError: the file was truncated.
        """
        count = (self.rows if stop is None else stop) - start
        width = self.columns * self.dtype.itemsize
        if not count * width:  # of fewer rows than ranks, some ranks have none
            return torch.empty(count, self.columns, dtype=self.dtype)
        data = np.fromfile(self.file, np.uint8, count=count * width, offset=self.offset + start * width)
        if data.size != count * width:
            raise UserError(f"{self.file}: the file has changed while it was read")
        return torch.from_numpy(data).view(self.dtype).reshape(count, self.columns)

    def map(self) -> Tensor:
        """Return the tensor mapped into memory: its pages are read when they are needed. Changes stay in memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        mapped = np.memmap(self.file, np.uint8, "c", self.offset, (self.nbytes,))
        return torch.from_numpy(mapped).view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file.

    Raises:
        UserError: the file is damaged or truncated, or has a dtype that ftlib cannot read.
    """
    entries, start = read_safetensors_header(path)
    return {name: _stored(path, name, entry, start) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {entry['dtype']}", "Take unquantized weights.")
    return StoredTensor(path, start + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A safetensors file that several threads write by rows, in any order; it gets its name when it is closed."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.tmp")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            span = [offset, offset + entry.nbytes]
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in header if name[:2] != "__"}
        self._temporary.unlink(missing_ok=True)  # left by a killed process; symbolic links are not followed
        self._file = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.ftruncate(self._file, 8 + len(text) + offset)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write rows of a tensor, shape (rows, columns), starting at row number `row`."""
        if not values.numel():
            return
        data = values.contiguous().view(torch.uint8).numpy().data
        self._write(data.cast("B"), self._offsets[name] + row * values.shape[1] * values.dtype.itemsize)

    def _write(self, left: memoryview | bytes, offset: int) -> None:
        while left:
            written = os.pwrite(self._file, left, offset)
            left, offset = left[written:], offset + written

    def close(self) -> None:
        """Flush the file and rename it to its final name."""
        os.fsync(self._file)
        os.close(self._file)
        self._temporary.replace(self._path)

    def discard(self) -> None:
        """Remove the incomplete file."""
        os.close(self._file)
        self._temporary.unlink(missing_ok=True)
