"""The loss of a whole split as training computes it: same rows, labels, averaging, micro-batches and types of numbers.

Every row counts once, those of a mixture's part as often as the part's weight says, which is how often training draws
them. The loss is what training minimizes, smoothed labels included; the perplexity is that of the plain cross entropy,
by token whatever `loss.average` says. Dropout is off.

Batches are the same however many processes there are; each computes its share of them, and their sums are added
exactly, so that the result does not depend on who computed what.
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
from ftlib.models.loading import device
from ftlib.models.loss import answer_logits, count_items, cut_labels, loss_of_logits
from ftlib.models.registry import InputProcessor, validate_image_columns
from ftlib.training import distributed
from ftlib.training.checkpoints import pending_signal_number
from ftlib.training.data import MixtureSampler, SupervisedDataset, filter_by_length

_AHEAD = 4
"""Batches whose rows are prepared while one is computed."""


class LossBatch(NamedTuple):
    """Rows that are computed together: all of one part of a mixture.

    Attributes:
        dataset: its number; 0 without a mixture.
        indices: of the rows.
    """

    dataset: int
    indices: list[int]


class LossSums(NamedTuple):
    """Added up over rows.

    Attributes:
        loss: what training would minimize, times `items`.
        items: what it is averaged over: answer tokens, or rows.
        entropy: the plain cross entropy of every answer token.
        tokens: their number.
    """

    loss: float
    items: float
    entropy: float
    tokens: float


def loss_dataset(
    config: Config, prepared: PreparedDataset, split: str, processor: InputProcessor, cache: Path
) -> SupervisedDataset:
    """The rows of a split that its loss is of; as in training, rows that are too long are dropped or truncated.

    Args:
        cache: of their lengths, see `models.lengths.length_cache_path`.

    Raises:
        UserError: none fits; a row is too long, for `model.too_long: stop`; rows with or without an image where the
            model wants the opposite.
    """
    examples = prepared.rows(split)
    validate_image_columns(config.model, examples)
    fitted = filter_by_length(examples, config.data.templates, processor, config.model.too_long, split, cache)
    if fitted.summary:
        log.warning(fitted.summary)
    draw = MixtureSampler(prepared.counts(split, fitted.indices), config.data.weights, config.seed)
    templates, max_pixels = config.data.templates, config.data.max_pixels
    return SupervisedDataset(examples, prepared.root, templates, processor, fitted.indices, draw, max_pixels, cache)


def make_batches(rows: SupervisedDataset, size: int) -> list[LossBatch]:
    """Part by part, each by length, the longest rows first: little is padded, and the biggest batch fails at once."""
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
    """Loss and perplexity of a model in evaluation mode.

    All ranks must call it, and all get the same.

    Args:
        batches: from `make_batches`.
        precision: within which training calls the model.
        label: of the progress.

    Returns:
        value (the loss), perplexity, rows and tokens; of a mixture `parts`, the same of each; a number that is not
        finite is None.

    Raises:
        UserError: out of memory with a single row.
        Preempted: a rank was signalled; all stop after the same batch.
    """
    rank, world = log.rank_and_world_size()
    found = torch.zeros(len(batches), 4, dtype=torch.float64)
    mine = range(rank, len(batches), world)
    loaded = _load_batches(rows, [batches[number] for number in mine])
    remedy = "Set model.max_length, or evaluation.loss: false."
    enough = oom_as_user_error(remedy, doing="with a single row to compute the loss of")
    with enough, torch.no_grad(), precision, log.progress(label, len(rows)) as update:
        done = 0
        for first in range(0, len(batches), world):
            _stop_on_all_ranks()
            if first + rank < len(batches):
                found[first + rank] = torch.tensor(_loss_sums(model, rows.processor, next(loaded), config))
            done += sum(len(batch.indices) for batch in batches[first : first + world])
            update(done, "")
    table = distributed.all_reduce_sum(found).cpu()  # every number of one rank is added to zeros of the others
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
    """All ranks agree on every batch: one that left alone would be waited for."""
    if any(signalled := distributed.all_reduce_max(pending_signal_number())):
        name = signal.Signals(signalled[0]).name
        signals.adopt_remote_signal(name)
        raise signals.Preempted(name)


def _load_batches(rows: SupervisedDataset, batches: Iterable[LossBatch]) -> Iterator[list[EncodedExample]]:
    """The rows of each batch, encoded by threads a few batches ahead."""
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
    """Of some rows; in halves where memory does not suffice for them together."""
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
    """Of all batches, shape (batches, 4): exactly, so that their order does not matter."""
    return LossSums(*[math.fsum(column) for column in table.T.tolist()])


def _means(parts: Sequence[LossSums], weights: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """Loss and perplexity of parts that weigh differently."""

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
