"""Safetensors files read and written by rows, so that memory holds a few rows and never a file.

The format is eight bytes with the length of a JSON header, the header (name → dtype, shape, byte range), the data
(github.com/huggingface/safetensors, "Format"). Mapped files would count to a process's memory while they are read.
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

from ftlib import files
from ftlib.errors import UserError

INDEX = "model.safetensors.index.json"
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
class Stored:
    """A tensor in a file. It is read as rows: the first dimension, by all others together."""

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
        """Rows `start` to `stop` as stored, shape (rows, columns).

        Raises:
            UserError: the file has become shorter.
        """
        count = (self.rows if stop is None else stop) - start
        width = self.columns * self.dtype.itemsize
        data = np.fromfile(self.file, np.uint8, count=count * width, offset=self.offset + start * width)
        if data.size != count * width:
            raise UserError(f"{self.file}: the file has changed while it was read")
        return torch.from_numpy(data).view(self.dtype).reshape(count, self.columns)


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files by its stored name.

    Raises:
        UserError: no such files, one is missing or damaged, or a name stands in two of them.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise UserError(f"{folder}: {name} is both in {found[name].file.name} and in {path.name}")
            found[name] = tensor
    return found


def same(one: Stored, other: Stored, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two tensors hold the same numbers, up to a difference of `absolute` + `relative` · |other|."""
    if one.shape != other.shape:
        return False
    step = max(1, (1 << 20) // max(1, one.columns))
    spans = [(start, min(start + step, one.rows)) for start in range(0, one.rows, step)]
    return all(
        torch.allclose(one.read(*span).float(), other.read(*span).float(), rtol=relative, atol=absolute)
        for span in spans
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those of its index, or all there are.

    Raises:
        UserError: none, or one of the index is missing.
    """
    if (folder / INDEX).is_file():
        paths = [folder / name for name in sorted(set(files.read_json(folder / INDEX)["weight_map"].values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing, though {INDEX} names it")
    if not paths:
        raise UserError(f"{folder}: no *.safetensors in it", "Weights are merged from safetensors files only.")
    return paths


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
        UserError: damaged, cut short, or numbers of a type that cannot be merged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    if path.stat().st_size != end:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, but its header tells of {end:,}: it is damaged")
    return {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {name} holds numbers of type {entry['dtype']}", "Merge unquantized weights.")
    return Stored(path, start + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """One safetensors file, written by rows in any order by several threads; it appears when it is closed."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
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
        self._file = os.open(self._temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        os.ftruncate(self._file, 8 + len(text) + offset)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write rows of a tensor, shape (rows, columns), from row number `row` on."""
        data = values.contiguous().view(torch.uint8).numpy().data
        self._write(data.cast("B"), self._offsets[name] + row * values.shape[1] * values.dtype.itemsize)

    def _write(self, left: memoryview | bytes, offset: int) -> None:
        while left:
            written = os.pwrite(self._file, left, offset)
            left, offset = left[written:], offset + written

    def close(self) -> None:
        """Flush the file and give it its name."""
        os.fsync(self._file)
        os.close(self._file)
        self._temporary.replace(self._path)
