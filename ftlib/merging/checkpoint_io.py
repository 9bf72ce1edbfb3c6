"""Checkpoint I/O for merges: safetensors read and written by rows, canonical weight names, threads."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ftlib.core import files
from ftlib.core.safetensors_header import read_safetensors_header
from ftlib.errors import UserError

# Safetensors files are read and written by rows, so that only a few rows are in memory. Memory-mapped files would count
# as memory of the process.

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
        data = np.fromfile(self.file, np.uint8, count=count * width, offset=self.offset + start * width)
        if data.size != count * width:
            raise UserError(f"{self.file}: the file has changed while it was read")
        return torch.from_numpy(data).view(self.dtype).reshape(count, self.columns)


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return stored name → tensor for all safetensors files of a folder.

    Raises:
        UserError: there are no such files; a file is missing or damaged; a tensor is empty, in two files, or not in
            the file given by the index.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise UserError(f"{folder}: {name} is both in {found[name].file.name} and in {path.name}")
            if 0 in tensor.shape:
                raise UserError(
                    f"{path}: {name} is empty (shape {list(tensor.shape)}), as DeepSpeed ZeRO-3 leaves weights that "
                    "are not gathered when they are saved",
                    "Save with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint.",
                )
            found[name] = tensor
    if weight_files(folder)[0].name not in _WHOLE and (folder / INDEX).is_file():
        for name, file in sorted(_read_index(folder).items()):
            if name not in found and model_part_of(canonical_name(name)) != "head":
                raise UserError(f"{folder}: {name} is not in {file}, but {INDEX} lists it: the files are of two models")
    return found


def tensors_equal(one: StoredTensor, other: StoredTensor, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two tensors are equal within `absolute` + `relative` · |other|."""
    if one.shape != other.shape:
        return False
    step = max(1, (1 << 20) // max(1, one.columns))
    spans = [(start, min(start + step, one.rows)) for start in range(0, one.rows, step)]
    return all(
        torch.allclose(one.read(*span).float(), other.read(*span).float(), rtol=relative, atol=absolute)
        for span in spans
    )


_ADAPTER = "adapter_model.safetensors"
_WHOLE = ("model.safetensors", _ADAPTER)
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a folder's weights, chosen as in transformers and PEFT.

    These are adapter_model.safetensors for an adapter; for a model model.safetensors, else the files of the index, else
    numbered shards; without any of these names, all other files except consolidated ones, which are copies.

    Raises:
        UserError: there are none, or one is missing.
    """
    adapter = (folder / "adapter_config.json").is_file()
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    whole = next((name for name in (_WHOLE[::-1] if adapter else _WHOLE[:1]) if name in present), None)
    if whole:
        names = [whole]
    elif (folder / INDEX).is_file():
        names = sorted(set(_read_index(folder).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder}: {missing[0]} is missing, but {INDEX} lists it")
    else:
        names = _shards(folder, present) or [name for name in present if not name.startswith("consolidated")] or present
    if not names:
        raise UserError(f"{folder}: contains no *.safetensors", "Only safetensors files can be merged.")
    if dangling := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder / dangling[0]}: a link to a file that does not exist", "Download the model again.")
    return [folder / name for name in names]


def _shards(folder: Path, present: Sequence[str]) -> list[str]:
    """Return shards 1 to n of n; if there are several series, those named model-…."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for name in present:
        if match := _SHARD.fullmatch(name):
            series.setdefault((match[1], match[3]), {})[int(match[2])] = name
    if not series:
        return []
    own = [key for key in series if key[0] == "model"] or list(series)
    if len(own) > 1:
        raise UserError(
            f"{folder}: several series of shards: {', '.join(sorted(min(series[k].values()) for k in own))}"
        )
    found, total = series[own[0]], int(own[0][1])
    if missing := sorted(set(range(1, total + 1)) - found.keys()):
        numbers = ", ".join(map(str, missing[:5]))
        raise UserError(f"{folder}: {len(missing)} of {total} shards of {own[0][0]} are missing: number {numbers}")
    return [found[number] for number in sorted(found)]


def _read_index(folder: Path) -> dict[str, str]:
    """Return tensor → file."""
    index = files.read_json(folder / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{folder / INDEX}: has no valid weight_map")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file.

    Raises:
        UserError: the file is damaged or truncated, or has a dtype that cannot be merged.
    """
    entries, start = read_safetensors_header(path)
    return {name: _stored(path, name, entry, start) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {entry['dtype']}", "Merge unquantized weights.")
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


class Shard:
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
        self._temporary.unlink(missing_ok=True)  # left by a killed merge; symbolic links are not followed
        self._file = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.ftruncate(self._file, 8 + len(text) + offset)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write rows of a tensor, shape (rows, columns), starting at row number `row`."""
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


# Canonical weight names, independent of the transformers version, and the part of the model of each.
#
# PaliGemma's released files use `language_model.model.layers.0…` and `vision_tower.vision_model.encoder…`, a loaded
# model `model.language_model.layers.0…`, a newer one `model.vision_tower.encoder…`, PEFT adds the prefix
# `base_model.model.`, and a language model without its head lacks the first `model.`. These parts only describe
# nesting.

_NESTING = {"base_layer", "base_model", "model", "transformer", "gpt_neox", "vision_model", "module"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|position_ids|(?:^|\.)(?:attn|attention)\.(?:masked_)?bias)$")
_PARTS = {
    "projector": re.compile(
        r"(^|\.)(multi_modal_projector|connector|embed_vision|merger|deepstack_merger_list)\.|^image_newline$"
    ),
    "vision": re.compile(
        r"(^|\.)(vision_tower|visual)\.|^(encoder|post_layernorm|embeddings\.(patch|position)_embedding)\."
    ),
    "embeddings": re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings)\."),
    "head": re.compile(r"^(lm_head|embed_out)\."),
}


def canonical_name(name: str) -> str:
    """Return a weight's name without nesting prefixes; `language_model.lm_head` becomes the model's head."""
    words = [word for word in name.split(".") if word not in _NESTING]
    if words[:2] == ["language_model", "lm_head"]:
        words = words[1:]
    return ".".join(words)


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Return stored name → canonical name of all weights of a model.

    Files of Qwen2-VL and Qwen2.5-VL name the language model's weights as if it were the whole model.
    """
    found = {name: canonical_name(name) for name in stored}
    whole = any(name.startswith("visual.") for name in found.values())
    if not whole or any(name.startswith("language_model.") for name in found.values()):
        return found
    return {
        name: key if key.startswith(("visual.", "lm_head.")) else f"language_model.{key}" for name, key in found.items()
    }


def model_part_of(name: str) -> str:
    """Return the part of a weight by its canonical name: vision, projector, embeddings, head or language."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), "language")


def is_vocabulary_sized(name: str) -> bool:
    """Whether a weight (canonical name) has a row for each token: embeddings and head, but not position embeddings."""
    return model_part_of(name) in ("embeddings", "head") and name.endswith(".weight") and not name.startswith("wpe.")


def layer_of(name: str) -> int | None:
    """Return the number of a weight's layer, counted from 0; None outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def table_row_of(name: str) -> str:
    """Return the row of the statistics table for a weight: `language 3`, `vision 12`, `projector` …"""
    layer = layer_of(name)
    return model_part_of(name) if layer is None else f"{model_part_of(name)} {layer}"


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant buffer that older versions of transformers saved."""
    return _BUFFER.search(name) is not None


# Threads, one per core; torch, numpy, hashing and reading release the GIL.

T = TypeVar("T")
R = TypeVar("R")


def thread_count() -> int:
    """Return the number of threads: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Context with a pool whose threads use one core each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(thread_count(), initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield executor
    finally:
        torch.set_num_threads(before)


def run_in_threads(
    executor: ThreadPoolExecutor, call: Callable[[T], R], items: Iterable[T], stop: threading.Event
) -> list[R]:
    """Call a function on every item; a failure or a signal sets `stop` and cancels pending calls.

    Raises:
        the exception of the first failing call.
    """
    futures = [executor.submit(call, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done() and (error := future.exception()):
                raise error
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise
