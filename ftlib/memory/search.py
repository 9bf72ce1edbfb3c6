"""Find the largest micro-batch with which a step fits a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.core.paths import Site
from ftlib.core.text import format_gib
from ftlib.data.dataset import open_prepared
from ftlib.data.prompts import render_prompt
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.memory.estimate import (
    HostEstimate,
    MemoryEstimate,
    RowShape,
    build_meta_model,
    estimate_step,
    host_estimate,
    row_flops,
    shard_estimate,
)
from ftlib.memory.loading import SMALLEST_ROW, LoadingEstimate, measure_loading
from ftlib.models.encoding import look_up
from ftlib.models.lengths import ImageFolder, cached_token_lengths, length_cache_path
from ftlib.models.registry import family_of
from ftlib.models.sharding import Scope
from ftlib.runs.run import Run

ASSUMED_TEXT, ASSUMED_ANSWER = 96, 32
"""Assumed tokens of prompt and answer, and of the answer alone, without prepared data."""
ASSUMED_IMAGE = (640, 480)
"""Assumed width and height of an image in pixels, where they matter."""

MEMORY_SHARE = 0.94
"""Share of the GPU memory that the estimate may use; the rest is for fragmentation."""

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class BatchPlan:
    """A micro-batch size for a config.

    Attributes:
        micro_batch: rows.
        checkpointing: gradient checkpointing.
        estimate: of its memory.
    """

    micro_batch: int
    checkpointing: bool
    estimate: MemoryEstimate

    def apply_to(self, config: Config) -> Config:
        """The config with this micro-batch; its effective batch does not change."""
        training = {
            **config.training,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": config.rows_per_gpu // self.micro_batch,
            "gradient_checkpointing": self.checkpointing,
        }
        return config.model_copy(update={"training": training})


def parse_size(text: str) -> int:
    """Bytes of a size such as 12GiB, 12G or 800M; units are powers of 1024, as usual for GPU memory.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"{text}: not a size", "Write it as in 12GiB.")
    size = int(float(match[1]) * 2 ** (_UNITS[match[2].upper()] if match[2] else 0))
    if size < 1 << 20:
        raise UserError(f"{text}: no GPU is that small", "Write it as in 12GiB.")
    return size


def longest_row(
    config: Config, site: Site, folder: Path, model: torch.nn.Module, run: Run | None = None
) -> tuple[RowShape, bool]:
    """The longest training rows, and whether they come from prepared data.

    Without prepared data PaliGemma's rows are assumed to be the image, 64 tokens of prompt and 32 of answer, and rows
    of causal models to fill all positions (or `model.max_length`). Where the tokens of an image depend on its size, the
    image is assumed to be `ASSUMED_IMAGE`.
    """
    try:
        prepared = open_prepared(config, site, run)
    except UserError:
        assumed = (
            _assumed_image_row(config, folder) if config.model.entry.auto_processor else _assumed_row(config, model)
        )
        return assumed, False
    inputs = family_of(config.model).load_processor(folder, config)
    cache = length_cache_path(prepared, "train", config, folder, site)
    rows, images = prepared.rows("train"), ImageFolder(prepared.root, config.data.max_pixels)
    lengths = cached_token_lengths(rows, config.data.templates, inputs, cache, images)
    found = _longest_row(config, lengths, inputs.max_length)
    totals = lengths.sum(axis=1)
    longest = rows[int(np.where(totals <= found.tokens, totals, 0).argmax())]
    usual = len(longest.images) == int(config.model.entry.images)
    if usual and not inputs.length_depends_on_image:
        return found, True
    blank = [Image.new("RGB", images.size(name)) for name in longest.images]
    row = inputs.encode_train(render_prompt(longest, config.data.templates), blank, longest.suffix)
    return replace(found, batch=look_up(inputs.collate([row]))), True


def _longest_row(config: Config, lengths: NDArray[np.int32], limit: int | None) -> RowShape:
    """Rows longer than `limit` are truncated or left out."""
    totals = lengths.sum(axis=1)
    most = limit or int(totals.max())
    if config.model.too_long != "truncate":
        lengths, totals = lengths[totals <= most], totals[totals <= most]
    if not len(lengths):
        raise UserError(f"none of the training rows fits into {most:,} tokens")
    tokens = min(most, int(totals.max()))
    answer = tokens if config.loss.on == "everything" else int(lengths[:, 1].max())
    return RowShape(tokens, min(answer, tokens - 1))


def _assumed_row(config: Config, model: torch.nn.Module) -> RowShape:
    shapes = model.config
    vision = getattr(shapes, "vision_config", None)
    if vision is None:
        positions = shapes.get_text_config().max_position_embeddings  # type: ignore[union-attr, operator]
        tokens = min(config.model.max_length or positions, positions)
        return RowShape(tokens, tokens - 1)
    images = (vision.image_size // vision.patch_size) ** 2
    tokens = min(images + ASSUMED_TEXT, config.model.max_length or images + ASSUMED_TEXT)
    return RowShape(tokens, min(ASSUMED_ANSWER, tokens - images))


def _assumed_image_row(config: Config, folder: Path) -> RowShape:
    plain = config.model_copy(update={"data": config.data.model_copy(update={"prompt": "{prefix}"})})
    inputs = family_of(config.model).load_processor(folder, plain)
    prompt, answer = (" word" * count for count in (ASSUMED_TEXT - ASSUMED_ANSWER, ASSUMED_ANSWER - 1))
    row = inputs.encode_train(prompt, Image.new("RGB", ASSUMED_IMAGE), answer)
    return RowShape(len(row.input_ids), max(1, row.n_labels), look_up(inputs.collate([row])))


def largest_batch_size(
    model: torch.nn.Module,
    config: Config,
    rows: RowShape,
    capacity: int,
    checkpointing: bool,
    at_most: int | None = None,
    shards: int = 1,
) -> BatchPlan | None:
    """The largest micro-batch that fits; None if not even a single row does.

    Micro-batches divide a GPU's share of the effective batch, so that the effective batch does not change.

    Args:
        capacity: bytes of the GPU.
        at_most: upper bound of the micro-batch.
        shards: number of GPUs that share the model.
    """
    share = config.rows_per_gpu
    sizes = [size for size in range(1, min(share, at_most or share) + 1) if share % size == 0]
    best, low, high = None, 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        found = _per_gpu(estimate_step(model, config, rows, sizes[middle], checkpointing), model, shards)
        if found.total <= capacity:
            best, low = BatchPlan(sizes[middle], checkpointing, found), middle + 1
        else:
            high = middle
    return best


def _per_gpu(whole: MemoryEstimate, model: torch.nn.Module, shards: int) -> MemoryEstimate:
    return shard_estimate(whole, model, shards) if shards > 1 else whole


def choose_batch_size(
    model: torch.nn.Module, config: Config, rows: RowShape, capacity: int, at_most: int | None = None
) -> BatchPlan:
    """The largest micro-batch that fits, with gradient checkpointing only if nothing fits without it.

    If the config sets `training.gradient_checkpointing`, only that is tried.

    Raises:
        UserError: not even a single row fits.
    """
    wanted = config.training.get("gradient_checkpointing")
    for checkpointing in (False, True) if wanted is None else (bool(wanted),):
        if found := largest_batch_size(model, config, rows, capacity, checkpointing, at_most):
            return found
    least = estimate_step(model, config, rows, 1, wanted is not False)
    needed, there = format_gib(least.total), format_gib(capacity)
    problem = f"one row of {rows.tokens:,} tokens needs {needed} of GPU memory, there are {there}"
    raise UserError(problem, "Try model.quantization: nf4, a smaller image size, or a shorter model.max_length.")


# `parallel.shard`: whether several GPUs share a model.


@dataclass(frozen=True)
class ShardingChoice:
    """Over which GPUs a model is sharded.

    Attributes:
        shards: the number of GPUs that share a model; 1: each has all of it.
        reason: a sentence for the log.
    """

    scope: Scope
    shards: int
    reason: str


def choose_sharding(
    config: Config,
    estimate: Callable[[], tuple[torch.nn.Module, MemoryEstimate]],
    capacity: int | None,
    world: int,
    nodes: int,
) -> ShardingChoice:
    """Choose by `parallel.shard`.

    Args:
        estimate: returns the model, from `build_meta_model`, and its memory without sharding; called only if needed.
        capacity: bytes of each GPU; None: unknown.
        world: number of GPUs, on all nodes together.

    Raises:
        UserError: the config asks for sharding, which is not possible with it.
    """
    wanted, obstacle = config.parallel.shard, config.sharding_obstacle
    if world == 1:
        return ShardingChoice("none", 1, "there is one GPU")
    if wanted == "none":
        return ShardingChoice("none", 1, "parallel.shard: none")
    if wanted == "full":
        if obstacle:
            raise UserError(f"parallel.shard: full: {obstacle}")
        return ShardingChoice("full", world, "parallel.shard: full")
    if obstacle:
        return ShardingChoice("none", 1, f"this config cannot be sharded: {obstacle}")
    if capacity is None:
        return ShardingChoice("none", 1, "the memory of the GPUs is unknown")
    model, whole = estimate()
    there = f"{format_gib(capacity)} of each GPU"
    if whole.total <= MEMORY_SHARE * capacity:
        return ShardingChoice("none", 1, f"the whole model needs {format_gib(whole.total)}, which fits into {there}")
    per_node = world // nodes
    if nodes > 1 and per_node > 1:
        in_node = shard_estimate(whole, model, per_node)
        if in_node.total <= MEMORY_SHARE * capacity:
            needs = f"{format_gib(whole.total)} do not fit into {there}; over the {per_node} GPUs of a node"
            return ShardingChoice("node", per_node, f"{needs} it is {format_gib(in_node.total)}")
    sharded = shard_estimate(whole, model, world)
    needs = f"{format_gib(whole.total)} do not fit into {there}; over {world} GPUs it is {format_gib(sharded.total)}"
    return ShardingChoice("full", world, needs)


# The GPU memory of a config with and without gradient checkpointing, and the largest micro-batches that fit.

_BOTH = (False, True)
"""Without and with gradient checkpointing."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a config on a GPU.

    Attributes:
        found: whether `rows` come from prepared data; else they are assumed.
        capacity: bytes of the GPU; None: unknown.
        sharding: over which GPUs the model is sharded.
        host: memory of nodes, and storage.
        estimates: for the config's micro-batch on each GPU, by checkpointing.
        scopes: the same by the number of GPUs that share the model; 1: each holds all of it.
        largest: micro-batch that fits, by checkpointing; None if nothing fits, or the capacity is unknown.
        flops: of a longest row, see `estimate.row_flops`.
        loading: CPU time of loading rows; None without prepared data, where its images cannot be read, or for rows of
            fewer FLOP than `loading.SMALLEST_ROW`.
    """

    config: Config
    rows: RowShape
    found: bool
    capacity: int | None
    sharding: ShardingChoice
    host: HostEstimate
    estimates: dict[bool, MemoryEstimate]
    scopes: dict[int, dict[bool, MemoryEstimate]]
    largest: dict[bool, BatchPlan | None]
    flops: int
    loading: LoadingEstimate | None = None

    @property
    def estimate(self) -> MemoryEstimate:
        """The memory of the config without changes."""
        return self.estimates[bool(self.config.training.get("gradient_checkpointing"))]

    @property
    def evaluation(self) -> int | None:
        """The memory of evaluating a sharded model during training, without activations: all weights are gathered on
        each GPU, beside its part of them and of the optimizer's state. None if there is no such evaluation.
        """
        if self.sharding.shards == 1 or not self.config.evaluates_in_training:
            return None
        whole, own = (self.scopes[shards][False] for shards in (1, self.sharding.shards))
        return whole.weights + whole.weights // self.sharding.shards + whole.adapter + own.optimizer + whole.context

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None if the capacity is unknown."""
        return None if self.capacity is None else max(self.estimate.total, self.evaluation or 0) <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; sizes in bytes."""
        return {
            "rows": {"tokens": self.rows.tokens, "answer": self.rows.answer, "assumed": not self.found},
            "effective_batch": self.config.effective_batch_size,
            "micro_batch": self.config.micro_batch_size,
            "row_flops": self.flops,
            "gpu": self.capacity,
            "fits": self.fits,
            "need": {_key(one): {**asdict(self.estimates[one]), "total": self.estimates[one].total} for one in _BOTH},
            "largest": {_key(one): self._batch_plan_json(self.largest[one]) for one in _BOTH},
            **(self._several_gpus_json() if self.config.job.world_size > 1 else {}),
            **({"loading": self.loading.to_json()} if self.loading else {}),
        }

    def _several_gpus_json(self) -> dict[str, Any]:
        peaks = {
            str(shards): {_key(one): found.total for one, found in needs.items()}
            for shards, needs in self.scopes.items()
        }
        host = {**asdict(self.host), "write_seconds": self.host.write_seconds}
        facts = {"sharding": asdict(self.sharding), "peak_by_shards": peaks, "host": host}
        return {**facts, "evaluation": self.evaluation}

    def _batch_plan_json(self, plan: BatchPlan | None) -> dict[str, int] | None:
        if plan is None:
            return None
        accumulation = self.config.rows_per_gpu // plan.micro_batch
        return {"micro_batch": plan.micro_batch, "accumulation": accumulation, "total": plan.estimate.total}


def _key(checkpointing: bool) -> str:
    return "checkpointing" if checkpointing else "no_checkpointing"


def plan_memory(config: Config, site: Site, capacity: int | None) -> MemoryPlan:
    """Estimate the memory of a config, and find the largest micro-batches that fit.

    Raises:
        UserError: the base model is not staged.
    """
    folder = find_model(config.model, site)
    model = build_meta_model(folder, config)
    rows, found = longest_row(config, site, folder, model)
    needs = {one: estimate_step(model, config, rows, config.micro_batch_size, one) for one in _BOTH}
    own = needs[bool(config.training.get("gradient_checkpointing"))]
    choice = choose_sharding(config, lambda: (model, own), capacity, config.job.world_size, config.job.nodes)
    shared = set() if config.sharding_obstacle else {config.job.world_size // config.job.nodes, config.job.world_size}
    scopes = {shards: {one: _per_gpu(needs[one], model, shards) for one in _BOTH} for shards in sorted({1, *shared})}
    needs = scopes[choice.shards]
    cuts = {
        one: largest_batch_size(model, config, rows, capacity, one, shards=choice.shards) if capacity else None
        for one in _BOTH
    }
    host, flops = host_estimate(model, config, choice.shards), row_flops(model, config, rows)
    loading = _measure_loading(config, site, folder, flops / rows.tokens) if found and flops > SMALLEST_ROW else None
    return MemoryPlan(config, rows, found, capacity, choice, host, needs, scopes, cuts, flops, loading)


def _measure_loading(config: Config, site: Site, folder: Path, flops_per_token: float) -> LoadingEstimate | None:
    prepared, inputs = open_prepared(config, site), family_of(config.model).load_processor(folder, config)
    try:
        return measure_loading(config, prepared.rows("train"), prepared.root, inputs, flops_per_token)
    except UserError as error:
        log.warning(f"data loading was not measured: {error.problem}")
        return None
