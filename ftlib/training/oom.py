"""GPU out of memory: choosing the micro-batch size (`batch.auto`), and halving it during training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ftlib.config.loader import Experiment
from ftlib.core import jsonl, log
from ftlib.core.gpu import gpu_memory_bytes, gpu_name
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.core.paths import Site
from ftlib.core.text import format_gib
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.memory.estimate import build_meta_model
from ftlib.memory.search import MEMORY_SHARE, choose_batch_size, longest_row
from ftlib.models.encoding import split_batch
from ftlib.runs.run import Run

# Out of memory during training: halve the micro-batch and compute the same step again.
#
# A micro-batch's loss is a sum over its rows, divided by the item count of the whole effective batch, so its halves
# add up to the same loss and the same gradients.

Compute = Callable[[dict[str, Tensor]], Tensor]
"""Forward and backward of some rows: accumulates gradients and returns the loss."""


class MicroBatchSplitter:
    """Computes the micro-batches of optimizer steps, in smaller pieces after an out-of-memory error.

    Args:
        on_halved: called with the new micro-batch size.
    """

    def __init__(self, on_halved: Callable[[int], None] = lambda size: None) -> None:
        self.size: int | None = None
        self.on_halved = on_halved
        self._step = -1
        self._step_batches: list[dict[str, Tensor]] = []
        self._random: list[Tensor] = []

    def reset(self) -> None:
        """Forget the micro-batches of the previous phase; steps count from 0 again."""
        self._step = -1

    def run(self, step: int, batch: dict[str, Tensor], compute: Compute, zero_grad: Callable[[], None]) -> Tensor:
        """Compute a micro-batch; if memory runs out, recompute all micro-batches of this step so far in halves.

        Args:
            step: optimizer steps done; a new number starts a new step.
            batch: tensors whose first dimension is rows, or what `encoding.PER_ROW` says.
            zero_grad: clears the gradients of this step.

        Returns:
            The micro-batch's loss.

        Raises:
            UserError: out of memory with a single row.
        """
        if step != self._step:
            self._step, self._step_batches, self._random = step, [], _random_states()
        self._step_batches.append(batch)
        losses = self._try_compute([batch], compute)
        while losses is None:
            self._halve()
            zero_grad()
            _restore(self._random)
            losses = self._try_compute(self._step_batches, compute)
        return losses[-1]

    def _try_compute(self, batches: list[dict[str, Tensor]], compute: Compute) -> list[Tensor] | None:
        """Return the losses, or None if out of memory; tensors of the failed attempt are free after the return."""
        try:
            return [self._in_pieces(batch, compute) for batch in batches]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _in_pieces(self, batch: dict[str, Tensor], compute: Compute) -> Tensor:
        size = self.size or _rows(batch)
        if size >= _rows(batch):
            return compute(batch)
        return torch.stack([compute(piece) for piece in split_batch(batch, size)]).sum()

    def _halve(self) -> None:
        largest = max(map(_rows, self._step_batches))
        size = min(self.size or largest, largest)
        if size == 1:
            raise UserError(
                "out of memory with a micro-batch of one row",
                "Set training.gradient_checkpointing: true or model.quantization: nf4, or ask for a larger GPU; "
                "`ftlib plan CONFIG --gpu SIZE` shows what would fit.",
            )
        self.size = (size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.on_halved(self.size)


def _rows(batch: dict[str, Tensor]) -> int:
    return len(batch["input_ids"] if "input_ids" in batch else next(iter(batch.values())))


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


# `batch.auto`: the micro-batch size for this GPU.


def auto_batch_size(experiment: Experiment, run: Run, site: Site) -> Experiment:
    """With `batch.auto`, return the experiment with the largest micro-batch that fits this GPU, and log it.

    Sizes that ran out of memory on this GPU model are not tried again. Without a GPU or `batch.auto`, the experiment is
    returned unchanged.

    Raises:
        UserError: not even a single row fits, or there are several tasks.
    """
    config, capacity = experiment.config, gpu_memory_bytes()
    if config.batch.auto and log.rank_and_world_size()[1] > 1:
        raise UserError("batch.auto supports one GPU, but this job has several tasks", "Set it to false.")
    if not config.batch.auto or capacity is None:
        return experiment
    folder = find_model(config.model, site)
    model = build_meta_model(folder, config)
    rows, _ = longest_row(config, site, folder, model, run)
    cut = choose_batch_size(model, config, rows, int(MEMORY_SHARE * capacity), _largest_known_good(run))
    chosen = cut.apply_to(config)
    accumulation = chosen.training["gradient_accumulation_steps"]
    facts = {"micro_batch": cut.micro_batch, "accumulation": accumulation, "checkpointing": cut.checkpointing}
    run.log_event("micro-batch", **facts, predicted=cut.estimate.total, gpu=gpu_name())
    how = "with" if cut.checkpointing else "without"
    log.info(
        f"batch.auto: micro-batches of {cut.micro_batch}, {accumulation} per step, {how} gradient checkpointing: "
        f"{format_gib(cut.estimate.total)} of {format_gib(capacity)}"
    )
    return replace(experiment, config=chosen)


def record_oom(run: Run, size: int) -> None:
    """Log that memory ran out, and the new micro-batch size."""
    run.log_event("out of memory", micro_batch=size, gpu=gpu_name())
    log.warning(f"out of memory; repeating the step with micro-batches of {size}")


def _largest_known_good(run: Run) -> int | None:
    """Return the smallest micro-batch size logged after an out-of-memory error on this GPU model, or None."""
    lines = jsonl.read_jsonl_log(run.history)
    sizes = [line["micro_batch"] for line in lines if line["event"] == "out of memory" and line["gpu"] == gpu_name()]
    return min(sizes, default=None)
