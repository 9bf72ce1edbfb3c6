"""Checkpoint I/O for merges: the weight files of a folder, canonical weight names, threads."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from ftlib.core import files
from ftlib.errors import UserError
from ftlib.models.tensor_files import StoredTensor, read_header

INDEX = "model.safetensors.index.json"


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
