"""Merge tensors block by block and write the result in shards."""

from __future__ import annotations

import functools
import itertools
import math
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import torch
from torch import Tensor

from ftlib.core import files, log, signals
from ftlib.errors import UserError
from ftlib.merging import checkpoint_io, methods
from ftlib.merging.checkpoint_io import INDEX
from ftlib.merging.deltas import FinetunedModel
from ftlib.merging.plan import PlannedTensor
from ftlib.merging.recipe import BASE, MERGED, Recipe
from ftlib.merging.statistics import StatisticsAccumulator, TensorStatistics
from ftlib.models.tensor_files import SafetensorsWriter

# Merge one tensor block by block, after first passes for methods that need global statistics.

BLOCK = 1 << 18
"""Entries per block: few enough for a core's cache."""

Sparsify = Callable[[Tensor], Tensor]


class Cancelled(Exception):
    """The merge was cancelled."""


@dataclass(frozen=True)
class TensorBlocks:
    """A weight in the base and in the models, read by blocks of rows."""

    weight: PlannedTensor
    models: Sequence[FinetunedModel]
    stop: Event

    def base(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, the base's float32 rows) of every block, in order."""
        stored = self.weight.base
        step = max(1, BLOCK // max(1, stored.columns))
        for start in range(0, stored.rows, step):
            if self.stop.is_set():
                raise Cancelled
            yield start, stored.read(start, min(start + step, stored.rows)).float()

    def updates(self, model: int) -> Iterator[Tensor]:
        """Yield the blocks of one model's update."""
        for start, base in self.base():
            yield self.models[model].update(self.weight.name, start, base)


@dataclass(frozen=True)
class MergeJob:
    """A merge: base, models, weights and the output folder.

    Attributes:
        labels: names of the models for messages.
        stop: set to cancel the work.
    """

    recipe: Recipe
    weights: Sequence[PlannedTensor]
    models: Sequence[FinetunedModel]
    labels: Sequence[str]
    folder: Path
    stop: Event = field(default_factory=Event)

    def blocks(self, weight: PlannedTensor) -> TensorBlocks:
        """Return the rows of one weight."""
        return TensorBlocks(weight, self.models, self.stop)


@dataclass(frozen=True)
class GlobalTrim:
    """Result of the first pass of `trim: global` over the whole model.

    Attributes:
        thresholds: for every model, the smallest magnitude that is kept.
        tie: the sign where kept updates cancel out: the majority sign of the model.
    """

    thresholds: list[float]
    tie: int = 1

    def trims(self) -> list[Sparsify]:
        """Return new trims for one weight."""
        return [methods.MagnitudeTrim(threshold, None) for threshold in self.thresholds]


class TensorMerger:
    """Applies a recipe to one weight."""

    def __init__(self, recipe: Recipe, rows: TensorBlocks, global_trim: GlobalTrim | None) -> None:
        self._recipe, self._settings = recipe, recipe.resolved
        self._tie = global_trim.tie if global_trim else 1
        self._sparsify = global_trim.trims() if global_trim else self._make_sparsify(rows)
        self._arc = _arc(rows, recipe.weights) if recipe.method == "slerp" else (0.0, 0.0)

    def _make_sparsify(self, rows: TensorBlocks) -> list[Sparsify]:
        density = self._settings.get("density", 1)
        if density == 1:
            return []
        name, numbers = rows.weight.name, range(len(rows.models))
        if self._recipe.method == "ties":
            keep = int(density * rows.weight.elements)
            return [methods.make_trim(functools.partial(rows.updates, number), keep) for number in numbers]
        return [methods.DareDrop(density, self._settings["seed"], number, name) for number in numbers]

    def sparsify(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the kept entries of the next block's updates."""
        if not self._sparsify:
            return updates
        return [sparsify(update) for sparsify, update in zip(self._sparsify, updates, strict=True)]

    def merge_block(self, base: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Return the merged block."""
        weights = self._recipe.weights
        if self._recipe.method == "slerp":
            return methods.weighted_sum([base + update for update in kept], self._arc)
        normalize, scale = self._settings.get("normalize", "weights"), self._settings.get("scale", 1.0)
        if self._recipe.method in ("ties", "dare_ties"):
            return methods.ties_merge(kept, weights, normalize, scale, self._tie).add_(base)
        return methods.weighted_sum(kept, methods.coefficients(weights, normalize, scale)).add_(base)


def _arc(rows: TensorBlocks, weights: Sequence[float]) -> tuple[float, float]:
    dot = square_a = square_b = 0.0
    name = rows.weight.name
    for start, base in rows.base():
        a, b = (model.value(name, start, base).flatten().double() for model in rows.models)
        dot += float(torch.dot(a, b))
        square_a += float(torch.dot(a, a))
        square_b += float(torch.dot(b, b))
    return methods.slerp_coefficients(weights[1] / sum(weights), dot, math.sqrt(square_a), math.sqrt(square_b))


def find_global_trim(job: MergeJob, executor: ThreadPoolExecutor) -> GlobalTrim | None:
    """Return thresholds and tie sign of `trim: global`, as in the authors' code.

    With n entries and k = ⌊density·n⌋ the threshold is the (n - k)-th smallest magnitude, so k + 1 entries and all
    equal to the last are kept (github.com/prateeky2806/ties-merging, topk_values_mask and resolve_zero_signs).
    """
    density = job.recipe.resolved["density"]
    if density == 1:
        return None
    merged = [weight for weight in job.weights if weight.source == MERGED]
    total = sum(weight.elements for weight in merged)
    keep = min(total, int(density * total) + 1)
    log.info(f"computing the global threshold over {total:,} weights of each model")
    thresholds = []
    for model in range(len(job.models)):
        count = functools.partial(_count_all_tensors, job, executor, merged, model)
        thresholds.append(methods.kth_magnitude(count, keep)[0])
    return GlobalTrim(thresholds, _majority(job, GlobalTrim(thresholds), merged, executor))


def _count_all_tensors(
    job: MergeJob, executor: ThreadPoolExecutor, merged: Sequence[PlannedTensor], model: int, high: int | None
) -> Tensor:
    total, lock = torch.zeros(methods.BUCKETS, dtype=torch.int64), Lock()

    def one(weight: PlannedTensor) -> None:
        counts = methods.count_blocks(job.blocks(weight).updates(model), high)
        with lock:
            total.add_(counts)

    checkpoint_io.run_in_threads(executor, one, merged, job.stop)
    return total


def _majority(
    job: MergeJob, global_trim: GlobalTrim, merged: Sequence[PlannedTensor], executor: ThreadPoolExecutor
) -> int:
    """Return the majority sign of the elected entries; -1 without a majority, as in the authors' code."""

    def one(weight: PlannedTensor) -> float:
        trims, signs = global_trim.trims(), 0.0
        for start, base in job.blocks(weight).base():
            updates = [model.update(weight.name, start, base) for model in job.models]
            kept = [trim(update) for trim, update in zip(trims, updates, strict=True)]
            signs += float(methods.weighted_sum(kept, job.recipe.weights).sign().sum())
        return signs

    return 1 if sum(checkpoint_io.run_in_threads(executor, one, merged, job.stop)) > 0 else -1


# Write the result with one thread per core, into shards that get their names when they are complete.
#
# Every thread merges one weight at a time. A shard that exists with its statistics is not computed again, so a killed
# merge resumes with the missing shards.

SHARD_BYTES = 10**9
_BUFFERS = 10
"""Float32 blocks per thread, besides three for each model: base, sums, signs, masks, input and output."""

_CODE = 48 << 20
"""Memory of torch's libraries that are loaded on first use; about 30 MiB were measured."""


@dataclass
class _PendingShard:
    """A shard that is being written: its weights, and how many of them are unfinished."""

    path: Path
    weights: Sequence[PlannedTensor]
    unfinished: int
    records: dict[str, TensorStatistics]
    shard: SafetensorsWriter | None = None

    @property
    def statistics(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        return self.path.exists() and self.statistics.exists()


def expected_peak(job: MergeJob, held: int) -> int:
    """Return the peak memory of the merge in bytes, including `held` bytes for adapters and the current process."""
    widest = max((weight.base.columns for weight in job.weights), default=1)
    blocks = (3 * len(job.models) + _BUFFERS) * 4 * max(BLOCK, widest)
    return resident_peak() + _CODE + held + checkpoint_io.thread_count() * (blocks + (3 << 20))


def resident_peak() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_shards(job: MergeJob) -> list[TensorStatistics]:
    """Write every missing shard and the index; return the statistics of each weight.

    Raises:
        UserError: a merged weight is not finite, or the storage is full.
    """
    parts = _parts(job)
    missing = [part for part in parts if not part.done]
    if len(missing) < len(parts):
        signals.mark_resumable()
        log.info(f"resuming: {len(parts) - len(missing)} of {len(parts)} shards exist")
    with checkpoint_io.thread_pool() as pool:
        global_trim = None
        if missing and job.recipe.resolved.get("trim") == "global":
            global_trim = find_global_trim(job, pool)
        _write(job, missing, global_trim, pool)
    _write_index(job, parts)
    return [record for part in parts for record in files.read_json(part.statistics)]


def _parts(job: MergeJob) -> list[_PendingShard]:
    """Return the weights in order, divided into shards of at most `SHARD_BYTES`."""
    cuts: list[list[PlannedTensor]] = [[]]
    size = 0
    for weight in job.weights:
        if cuts[-1] and size + weight.entry.nbytes > SHARD_BYTES:
            cuts.append([])
            size = 0
        cuts[-1].append(weight)
        size += weight.entry.nbytes
    numbered = [f"model-{number:05d}-of-{len(cuts):05d}" for number in range(1, len(cuts) + 1)]
    names = numbered if len(cuts) > 1 else ["model"]
    paths = [job.folder / f"{name}.safetensors" for name in names]
    return [_PendingShard(path, cut, len(cut), {}) for path, cut in zip(paths, cuts, strict=True)]


def _write(
    job: MergeJob, parts: Sequence[_PendingShard], global_trim: GlobalTrim | None, pool: ThreadPoolExecutor
) -> None:
    lock = threading.Lock()
    total = sum(weight.elements for part in parts for weight in part.weights)
    finished = 0
    with log.progress("merged, percent", 100) as update:

        def one(item: tuple[_PendingShard, PlannedTensor]) -> None:
            nonlocal finished
            part, weight = item
            with lock:
                part.shard = part.shard or SafetensorsWriter(part.path, [weight.entry for weight in part.weights])
            record = _write_weight(job, weight, part.shard, global_trim)
            with lock:
                part.records[weight.name] = record
                part.unfinished -= 1
                finished += weight.elements
                update(finished * 100 // total, weight.name)
                last = part.unfinished == 0
            if last:
                _finish(part)

        checkpoint_io.run_in_threads(pool, one, [(part, weight) for part in parts for weight in part.weights], job.stop)


def _finish(part: _PendingShard) -> None:
    assert part.shard
    part.shard.close()
    files.write_json(part.statistics, [part.records[weight.name] for weight in part.weights])
    signals.mark_resumable()


def _write_weight(
    job: MergeJob, weight: PlannedTensor, shard: SafetensorsWriter, global_trim: GlobalTrim | None
) -> TensorStatistics:
    statistics = StatisticsAccumulator(len(job.models))
    rows = job.blocks(weight)
    merger = TensorMerger(job.recipe, rows, global_trim) if weight.source == MERGED else None
    if not weight.base.dtype.is_floating_point:
        shard.write(weight.entry.name, 0, weight.base.read())
        return statistics.to_json(weight.name, weight.source, weight.elements)
    for start, base in rows.base():
        if merger:
            updates = [model.update(weight.name, start, base) for model in job.models]
            kept = merger.sparsify(updates)
            statistics.add(updates, kept)
            value = merger.merge_block(base, kept)
        else:
            value = base if weight.source == BASE else job.models[int(weight.source)].value(weight.name, start, base)
        value = value.to(weight.entry.dtype)
        if not _is_finite(value):
            raise _not_finite(job, weight, start, base)
        shard.write(weight.entry.name, start, value)
    for start, rows_added in _added_rows(job, weight):
        value = rows_added.to(weight.entry.dtype)
        if not _is_finite(value):
            raise UserError(f"{weight.entry.name} has NaN or infinity in rows of added tokens; nothing was written")
        shard.write(weight.entry.name, start, value)
    return statistics.to_json(weight.name, weight.source, weight.elements)


def _added_rows(job: MergeJob, weight: PlannedTensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows) of tokens that the base lacks: the weighted average of the models that have them."""
    pairs = zip(job.models, job.recipe.weights, strict=True)
    holders = [(tensor, share) for model, share in pairs if (tensor := model.whole(weight.name))]
    ends = sorted({weight.base.rows, *(tensor.rows for tensor, _ in holders)} if holders else {weight.base.rows})
    for start, stop in itertools.pairwise(end for end in ends if end >= weight.base.rows):
        having = [(tensor, share) for tensor, share in holders if tensor.rows >= stop]
        shares = [share for _, share in having]
        weights = shares if sum(shares) else [1.0] * len(shares)
        blocks = [tensor.read(start, stop).float() for tensor, _ in having]
        yield start, methods.weighted_sum(blocks, methods.coefficients(weights, "weights", 1.0))


def _is_finite(values: Tensor) -> bool:
    """Check the sum first, because checking every number takes fifty times as long."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _not_finite(job: MergeJob, weight: PlannedTensor, start: int, base: Tensor) -> UserError:
    """Return an error that names the models with the NaN or infinity."""
    if not base.isfinite().all():
        culprits = ["the base"]
    else:
        pairs = zip(job.labels, job.models, strict=True)
        culprits = [label for label, model in pairs if not model.value(weight.name, start, base).isfinite().all()]
    if culprits:
        return UserError(f"{' and '.join(culprits)}: {weight.entry.name} has NaN or infinity; nothing was written")
    kind = str(weight.entry.dtype).removeprefix("torch.")
    return UserError(f"{weight.entry.name} became NaN or too large for {kind}", "Lower lambda or the weights.")


def _write_index(job: MergeJob, parts: Sequence[_PendingShard]) -> None:
    """Write the index that transformers needs for several shards."""
    if len(parts) == 1:
        return
    index = {
        "metadata": {"total_size": sum(weight.entry.nbytes for weight in job.weights)},
        "weight_map": {weight.entry.name: part.path.name for part in parts for weight in part.weights},
    }
    files.write_json(job.folder / INDEX, index)
