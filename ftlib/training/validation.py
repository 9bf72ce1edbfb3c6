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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftlib import console, preemption
from ftlib.config import Config
from ftlib.data.prepared import Prepared
from ftlib.models.families import Inputs, check_images
from ftlib.models.loading import device
from ftlib.models.rows import Row
from ftlib.out_of_memory import enough_memory, is_out_of_memory
from ftlib.training import ranks
from ftlib.training.batching import Draw, TrainingRows
from ftlib.training.checkpoints import signal_number
from ftlib.training.fitting import fit_rows
from ftlib.training.loss import answer_logits, count_items, cut_labels, loss_of_logits

_AHEAD = 4
"""Batches whose rows are prepared while one is computed."""


class Batch(NamedTuple):
    """Rows that are computed together: all of one part of a mixture.

    Attributes:
        part: its number; 0 without a mixture.
        places: of the rows.
    """

    part: int
    places: list[int]


class Sums(NamedTuple):
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


def rows_for_loss(config: Config, prepared: Prepared, split: str, inputs: Inputs) -> TrainingRows:
    """The rows of a split that its loss is of; as in training, rows that are too long are dropped or truncated.

    Raises:
        UserError: none fits; a row is too long, for `model.too_long: stop`; rows with or without an image where the
            model wants the opposite.
    """
    examples = prepared.rows(split)
    check_images(config.model.family, examples)
    fitted = fit_rows(examples, config.data.templates, inputs, config.model.too_long, split)
    if fitted.sentence:
        console.say(fitted.sentence)
    draw = Draw(prepared.counts(split, fitted.kept), config.data.weights, config.seed)
    return TrainingRows(examples, prepared.root, config.data.templates, inputs, fitted.kept, draw)


def cut_batches(rows: TrainingRows, size: int) -> list[Batch]:
    """Part by part, each by length, the longest rows first: little is padded, and the biggest batch fails at once."""
    lengths = [tokens for tokens, _ in rows.lengths()]
    batches = []
    for part, (start, count) in enumerate(zip(accumulate(rows.draw.sizes, initial=0), rows.draw.sizes, strict=False)):
        order = sorted(range(start, start + count), key=lambda place: -lengths[place])
        batches += [Batch(part, order[cut : cut + size]) for cut in range(0, count, size)]
    return batches


def split_loss(
    model: torch.nn.Module,
    rows: TrainingRows,
    batches: Sequence[Batch],
    config: Config,
    precision: AbstractContextManager[Any],
    label: str,
) -> dict[str, Any]:
    """Loss and perplexity of a model in evaluation mode.

    All ranks must call it, and all get the same.

    Args:
        batches: from `cut_batches`.
        precision: within which training calls the model.
        label: of the progress.

    Returns:
        value (the loss), perplexity, rows and tokens; of a mixture `parts`, the same of each; a number that is not
        finite is None.

    Raises:
        UserError: out of memory with a single row.
        Preempted: a rank was signalled; all stop after the same batch.
    """
    rank, world = console.ranks()
    found = torch.zeros(len(batches), 4, dtype=torch.float64)
    mine = range(rank, len(batches), world)
    loaded = _loaded(rows, [batches[number] for number in mine])
    remedy = "Set model.max_length, or evaluation.loss: false."
    enough = enough_memory(remedy, doing="with a single row to compute the loss of")
    with enough, torch.no_grad(), precision, console.progress(label, len(rows)) as update:
        done = 0
        for first in range(0, len(batches), world):
            _stop_together()
            if first + rank < len(batches):
                found[first + rank] = torch.tensor(_sums(model, rows.inputs, next(loaded), config))
            done += sum(len(batch.places) for batch in batches[first : first + world])
            update(done, "")
    table = ranks.total(found).cpu()  # every number of one rank is added to zeros of the others
    by_part = [
        _added(table[[number for number, batch in enumerate(batches) if batch.part == part]])
        for part in range(len(rows.draw.sizes))
    ]
    whole = _means(by_part, config.data.weights, rows.draw.sizes)
    names = [part.name for part in config.data.parts]
    parts = {
        name: _means([sums], [1.0], [size])
        for name, sums, size in zip(names, by_part, rows.draw.sizes, strict=False)
        if size
    }
    return whole | ({"parts": parts} if parts else {})


def _stop_together() -> None:
    """All ranks agree on every batch: one that left alone would be waited for."""
    if any(signalled := ranks.highest(signal_number())):
        name = signal.Signals(signalled[0]).name
        preemption.request(name)
        raise preemption.Preempted(name)


def _loaded(rows: TrainingRows, batches: Iterable[Batch]) -> Iterator[list[Row]]:
    """The rows of each batch, encoded by threads a few batches ahead."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting: deque[list[Any]] = deque()
        for batch in batches:
            waiting.append([pool.submit(rows.__getitem__, place) for place in batch.places])
            if len(waiting) > _AHEAD:
                yield [job.result() for job in waiting.popleft()]
        while waiting:
            yield [job.result() for job in waiting.popleft()]


def _sums(model: torch.nn.Module, inputs: Inputs, rows: Sequence[Row], config: Config) -> Sums:
    """Of some rows; in halves where memory does not suffice for them together."""
    try:
        return _sums_at_once(model, cut_labels(inputs.batch(rows)), config)
    except Exception as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    middle = (len(rows) + 1) // 2
    halves = [_sums(model, inputs, half, config) for half in (rows[:middle], rows[middle:])]
    return Sums(*map(sum, zip(*halves, strict=True)))


def _sums_at_once(model: torch.nn.Module, batch: dict[str, Tensor], config: Config) -> Sums:
    rule = config.loss
    here = {name: tensor.to(device()) for name, tensor in batch.items()}
    logits, labels = answer_logits(model, here)
    loss = loss_of_logits(logits, labels, rule.average, 1, rule.label_smoothing)
    plain = rule.average == "token" and not rule.label_smoothing
    entropy = loss if plain else loss_of_logits(logits, labels, "token", 1)
    counts = [count_items(labels, average) for average in (rule.average, "token")]
    return Sums(*torch.stack([loss.double(), counts[0], entropy.double(), counts[1]]).tolist())


def _added(table: Tensor) -> Sums:
    """Of all batches, shape (batches, 4): exactly, so that their order does not matter."""
    return Sums(*[math.fsum(column) for column in table.T.tolist()])


def _means(parts: Sequence[Sums], weights: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
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
