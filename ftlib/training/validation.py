"""The loss of a whole split as training computes it: same rows, labels, averaging, micro-batches and precision.

Every row counts once; rows of a mixture are weighted by their dataset's weight, as in training. The loss is the
training objective, label smoothing included; the perplexity is that of the plain cross entropy per token,
independent of `loss.average`. Dropout is off.

The batches do not depend on the number of processes. Each process computes its share, and the sums are added exactly,
so that the result does not depend on the distribution.
"""

from __future__ import annotations

import gc
import math
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftlib.config.schema import Config
from ftlib.core import log, signals
from ftlib.core.out_of_memory import is_out_of_memory, oom_as_user_error
from ftlib.data.dataset import PreparedDataset
from ftlib.models.encoding import EncodedExample
from ftlib.models.lengths import ImageFolder
from ftlib.models.loading import device
from ftlib.models.loss import answer_logits, count_items, cut_labels, loss_of_logits
from ftlib.models.registry import InputProcessor, validate_image_columns
from ftlib.training import distributed
from ftlib.training.checkpoints import pending_signal_number
from ftlib.training.data import MixtureSampler, SupervisedDataset, filter_by_length

_AHEAD = 4
"""Number of batches that are loaded ahead."""


class LossBatch(NamedTuple):
    """Rows that are computed together, all from one dataset of a mixture.

    Attributes:
        dataset: index of the dataset; 0 without a mixture.
        indices: of the rows.
    """

    dataset: int
    indices: list[int]


class LossSums(NamedTuple):
    """Sums over rows.

    Attributes:
        loss: the training objective times `items`.
        items: number of answer tokens or rows, whichever the loss is averaged over.
        entropy: the plain cross entropy of all answer tokens.
        tokens: number of answer tokens.
    """

    loss: float
    items: float
    entropy: float
    tokens: float


def loss_dataset(
    config: Config, prepared: PreparedDataset, split: str, processor: InputProcessor, cache: Path
) -> SupervisedDataset:
    """Return the rows of a split; as in training, rows that are too long are dropped or truncated.

    Args:
        cache: file of their lengths, see `models.lengths.length_cache_path`.

    Raises:
        UserError: no row fits; a row is too long, with `model.too_long: stop`; rows have an image that the model does
            not support, or lack one.
    """
    examples = prepared.rows(split)
    validate_image_columns(config.model, examples)
    templates, max_pixels = config.data.templates, config.data.max_pixels
    images = ImageFolder(prepared.root, max_pixels)
    fitted = filter_by_length(examples, templates, processor, config.model.too_long, split, cache, images)
    if fitted.summary:
        log.warning(fitted.summary)
    draw = MixtureSampler(prepared.counts(split, fitted.indices), config.data.weights, config.seed)
    return SupervisedDataset(examples, prepared.root, templates, processor, fitted.indices, draw, max_pixels, cache)


def make_batches(rows: SupervisedDataset, size: int) -> list[LossBatch]:
    """Batch each dataset by length, longest rows first: little padding, and the largest batch fails first."""
    lengths = [tokens for tokens, _ in rows.lengths()]
    batches = []
    for part, (start, count) in enumerate(
        zip(accumulate(rows.sampler.sizes, initial=0), rows.sampler.sizes, strict=False)
    ):
        order = sorted(range(start, start + count), key=lambda index: -lengths[index])
        batches += [LossBatch(part, order[cut : cut + size]) for cut in range(0, count, size)]
    return batches


def split_loss(
    model: torch.nn.Module,
    rows: SupervisedDataset,
    batches: Sequence[LossBatch],
    config: Config,
    precision: AbstractContextManager[Any],
    label: str,
) -> dict[str, Any]:
    """Return loss and perplexity of a model, which must be in evaluation mode.

    All ranks must call it, and all get the same result.

    Args:
        batches: from `make_batches`.
        precision: the autocast context of training.
        label: label of the progress.

    Returns:
        value (the loss), perplexity, rows and tokens; for a mixture also `parts`, the same for each dataset. Numbers
        that are not finite are None.

    Raises:
        UserError: out of memory with a single row.
        Preempted: a rank got a signal; all ranks stop after the same batch.
    """
    rank, world = log.rank_and_world_size()
    found = torch.zeros(len(batches), 4, dtype=torch.float64)
    mine = range(rank, len(batches), world)
    loaded = _load_batches(rows, [batches[number] for number in mine])
    remedy = "Set model.max_length, or evaluation.loss: false."
    oom = oom_as_user_error(remedy, doing="while computing the loss of a single row")
    with oom, torch.no_grad(), precision, log.progress(label, len(rows)) as update:
        done = 0
        for first in range(0, len(batches), world):
            _stop_on_all_ranks()
            if first + rank < len(batches):
                found[first + rank] = torch.tensor(_loss_sums(model, rows.processor, next(loaded), config))
            done += sum(len(batch.indices) for batch in batches[first : first + world])
            update(done, "")
    table = distributed.all_reduce_sum(found).cpu()  # each row of the table is non-zero on one rank only
    by_part = [
        _added(table[[number for number, batch in enumerate(batches) if batch.dataset == part]])
        for part in range(len(rows.sampler.sizes))
    ]
    whole = _means(by_part, config.data.weights, rows.sampler.sizes)
    names = [part.name for part in config.data.parts]
    parts = {
        name: _means([sums], [1.0], [size])
        for name, sums, size in zip(names, by_part, rows.sampler.sizes, strict=False)
        if size
    }
    return whole | ({"parts": parts} if parts else {})


def _stop_on_all_ranks() -> None:
    """Stop all ranks after the same batch if any of them got a signal: the others would wait for it."""
    if any(signalled := distributed.all_reduce_max(pending_signal_number())):
        name = signal.Signals(signalled[0]).name
        signals.adopt_remote_signal(name)
        raise signals.Preempted(name)


def _load_batches(rows: SupervisedDataset, batches: Iterable[LossBatch]) -> Iterator[list[EncodedExample]]:
    """Yield the encoded rows of each batch; threads load a few batches ahead."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting: deque[list[Any]] = deque()
        for batch in batches:
            waiting.append([pool.submit(rows.__getitem__, index) for index in batch.indices])
            if len(waiting) > _AHEAD:
                yield [job.result() for job in waiting.popleft()]
        while waiting:
            yield [job.result() for job in waiting.popleft()]


def _loss_sums(
    model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample], config: Config
) -> LossSums:
    """Return the sums of some rows; splits them in halves if memory runs out."""
    try:
        return _loss_sums_at_once(model, cut_labels(processor.collate(rows)), config)
    except Exception as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    middle = (len(rows) + 1) // 2
    halves = [_loss_sums(model, processor, half, config) for half in (rows[:middle], rows[middle:])]
    return LossSums(*map(sum, zip(*halves, strict=True)))


def _loss_sums_at_once(model: torch.nn.Module, batch: dict[str, Tensor], config: Config) -> LossSums:
    rule = config.loss
    here = {name: tensor.to(device()) for name, tensor in batch.items()}
    logits, labels = answer_logits(model, here)
    loss = loss_of_logits(logits, labels, rule.average, 1, rule.label_smoothing)
    plain = rule.average == "token" and not rule.label_smoothing
    entropy = loss if plain else loss_of_logits(logits, labels, "token", 1)
    counts = [count_items(labels, average) for average in (rule.average, "token")]
    return LossSums(*torch.stack([loss.double(), counts[0], entropy.double(), counts[1]]).tolist())


def _added(table: Tensor) -> LossSums:
    """Return the exact sums over all batches, shape (batches, 4), independent of their order."""
    return LossSums(*[math.fsum(column) for column in table.T.tolist()])


def _means(parts: Sequence[LossSums], weights: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """Return loss and perplexity of weighted datasets."""

    def mean(of: str, by: str) -> float:
        over = [math.fsum(w * getattr(sums, name) for w, sums in zip(weights, parts, strict=True)) for name in (of, by)]
        return over[0] / over[1] if over[1] else math.nan

    entropy = mean("entropy", "tokens")
    perplexity = math.exp(entropy) if entropy < 700 else math.inf
    return {
        "value": _finite(mean("loss", "items")),
        "perplexity": _finite(perplexity),
        "rows": sum(sizes),
        "tokens": round(sum(sums.tokens for sums in parts)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
