"""Write the result weight by weight, one thread a core, into shards that appear when they are whole.

Every thread works on one weight, block by block. A shard that is there with its statistics is not done again, so a
merge that was killed goes on with the shards that are missing.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftlib import console, files
from ftlib.errors import UserError
from ftlib.merging import threads
from ftlib.merging.blend import BLOCK, Blender, Overall, Work, find_overall
from ftlib.merging.plan import Weight
from ftlib.merging.recipe import BASE, MERGED
from ftlib.merging.statistics import Record, Statistics
from ftlib.merging.tensors import INDEX, Shard

SHARD_BYTES = 10**9
_BUFFERS = 10
"""Float32 blocks that a thread holds beside three for each model: base, sums, signs, masks, bytes in and out."""

_CODE = 48 << 20
"""Of torch's libraries, what is read in only when it is used; some 30 MiB were measured."""


@dataclass
class _Part:
    """A shard at work: its weights, and how many of them are not finished."""

    path: Path
    weights: Sequence[Weight]
    left: int
    records: dict[str, Record]
    shard: Shard | None = None

    @property
    def statistics(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        return self.path.exists() and self.statistics.exists()


def expected_peak(work: Work, held: int) -> int:
    """Bytes of memory that the merge will use at its peak, `held` for adapters and what the process has now."""
    widest = max((weight.base.columns for weight in work.weights), default=1)
    blocks = (3 * len(work.models) + _BUFFERS) * 4 * max(BLOCK, widest)
    return resident_peak() + _CODE + held + threads.count() * (blocks + (3 << 20))


def resident_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_shards(work: Work) -> list[Record]:
    """Write every shard that is missing and the index; what was done to each weight is returned.

    Raises:
        UserError: a weight came out as no finite number, or the storage is full.
    """
    parts = _parts(work)
    missing = [part for part in parts if not part.done]
    if len(missing) < len(parts):
        console.say(f"going on: {len(parts) - len(missing)} of {len(parts)} shards are there")
    with threads.pool() as pool:
        overall = None
        if missing and work.recipe.resolved.get("trim") == "global":
            overall = find_overall(work, pool)
        _write(work, missing, overall, pool)
    _write_index(work, parts)
    return [record for part in parts for record in files.read_json(part.statistics)]


def _parts(work: Work) -> list[_Part]:
    """The weights in their order, cut where a shard would become larger than `SHARD_BYTES`."""
    cuts: list[list[Weight]] = [[]]
    size = 0
    for weight in work.weights:
        if cuts[-1] and size + weight.entry.nbytes > SHARD_BYTES:
            cuts.append([])
            size = 0
        cuts[-1].append(weight)
        size += weight.entry.nbytes
    numbered = [f"model-{number:05d}-of-{len(cuts):05d}" for number in range(1, len(cuts) + 1)]
    names = numbered if len(cuts) > 1 else ["model"]
    paths = [work.folder / f"{name}.safetensors" for name in names]
    return [_Part(path, cut, len(cut), {}) for path, cut in zip(paths, cuts, strict=True)]


def _write(work: Work, parts: Sequence[_Part], overall: Overall | None, pool: ThreadPoolExecutor) -> None:
    lock = threading.Lock()
    total = sum(weight.elements for part in parts for weight in part.weights)
    finished = 0
    with console.progress("merged, percent", 100) as update:

        def one(item: tuple[_Part, Weight]) -> None:
            nonlocal finished
            part, weight = item
            with lock:
                part.shard = part.shard or Shard(part.path, [weight.entry for weight in part.weights])
            record = _write_weight(work, weight, part.shard, overall)
            with lock:
                part.records[weight.name] = record
                part.left -= 1
                finished += weight.elements
                update(finished * 100 // total, weight.name)
                last = part.left == 0
            if last:
                _finish(part)

        threads.run(pool, one, [(part, weight) for part in parts for weight in part.weights], work.stop)


def _finish(part: _Part) -> None:
    assert part.shard
    part.shard.close()
    files.write_json(part.statistics, [part.records[weight.name] for weight in part.weights])


def _write_weight(work: Work, weight: Weight, shard: Shard, overall: Overall | None) -> Record:
    statistics = Statistics(len(work.models))
    rows = work.rows(weight)
    blender = Blender(work.recipe, rows, overall) if weight.source == MERGED else None
    if not weight.base.dtype.is_floating_point:
        shard.write(weight.entry.name, 0, weight.base.read())
        return statistics.record(weight.name, weight.source, weight.elements)
    for start, base in rows.base():
        if blender:
            updates = [model.update(weight.name, start, base) for model in work.models]
            kept = blender.sparsify(updates)
            statistics.add(updates, kept)
            value = blender.mix(base, kept)
        else:
            value = base if weight.source == BASE else work.models[int(weight.source)].value(weight.name, start, base)
        value = value.to(weight.entry.dtype)
        if not _is_finite(value):
            raise _not_finite(work, weight, start, base)
        shard.write(weight.entry.name, start, value)
    return statistics.record(weight.name, weight.source, weight.elements)


def _is_finite(values: Tensor) -> bool:
    """The sum is looked at first: looking at every number takes fifty times as long."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _not_finite(work: Work, weight: Weight, start: int, base: Tensor) -> UserError:
    """Say whose numbers they are."""
    if not base.isfinite().all():
        culprits = ["the base"]
    else:
        pairs = zip(work.labels, work.models, strict=True)
        culprits = [label for label, model in pairs if not model.value(weight.name, start, base).isfinite().all()]
    if culprits:
        return UserError(f"{' and '.join(culprits)}: {weight.entry.name} holds NaN or infinity; nothing was written")
    kind = str(weight.entry.dtype).removeprefix("torch.")
    return UserError(f"{weight.entry.name} became NaN or too large for {kind}", "Lower lambda or the weights.")


def _write_index(work: Work, parts: Sequence[_Part]) -> None:
    """The index that transformers looks for beside several shards."""
    if len(parts) == 1:
        return
    index = {
        "metadata": {"total_size": sum(weight.entry.nbytes for weight in work.weights)},
        "weight_map": {weight.entry.name: part.path.name for part in parts for weight in part.weights},
    }
    files.write_json(work.folder / INDEX, index)
