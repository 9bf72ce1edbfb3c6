"""GPU out of memory: choosing the micro-batch size (`batch.auto`), and halving it during training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ftlib.config.loader import Experiment
from ftlib.config.schema import Config
from ftlib.core import jsonl, log
from ftlib.core.gpu import gpu_memory_bytes, gpu_name
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.core.paths import Site
from ftlib.core.text import format_gib
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.memory.estimate import build_meta_model
from ftlib.memory.search import MEMORY_SHARE, BatchPlan, choose_batch_size, longest_row
from ftlib.models.encoding import split_batch
from ftlib.models.linear_cross_entropy import random_states, set_random_states
from ftlib.runs.run import Run
from ftlib.training import distributed

# Out of memory during training: halve the micro-batch and compute the same step again.
#
# A micro-batch's loss is a sum over its rows, divided by the item count of the whole effective batch, so its halves
# add up to the same loss and the same gradients.
#
# With several GPUs all ranks do so together. A rank that ran out of memory within a collective would leave the others
# waiting, so no gradients are reduced before all ranks have computed all micro-batches of a step.

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
        self._failed = False
        self._returned = torch.zeros(())

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
        self._add(step, batch)
        losses = self._try_compute([batch], compute)
        while losses is None:
            losses = self._repeat(compute, zero_grad)
        return losses[-1]

    def run_on_all_ranks(
        self, step: int, batch: dict[str, Tensor], compute: Compute, zero_grad: Callable[[], None], last: bool
    ) -> Tensor:
        """Compute a micro-batch of a step on several ranks; if memory runs out on any, all repeat the step in halves.

        All ranks must call it equally often.

        Args:
            step, batch, zero_grad: as for `run`.
            compute: must not communicate.
            last: whether this is the step's last micro-batch: then the ranks agree.

        Returns:
            Losses that add up to the step's loss; if memory ran out, 0 until the last micro-batch, which has the rest.

        Raises:
            UserError: out of memory with a single row on any rank; on all ranks.
        """
        self._add(step, batch)
        losses = None if self._failed else self._try_compute([batch], compute)
        self._failed = losses is None
        repeated = False
        while last and distributed.all_reduce_max(int(losses is None))[0]:
            losses, repeated = self._repeat(compute, zero_grad), True
        if repeated and losses:
            return torch.stack(losses).sum() - self._returned
        loss = losses[0] if losses else torch.zeros((), device=next(iter(batch.values())).device)
        self._returned = self._returned + loss
        return loss

    def _add(self, step: int, batch: dict[str, Tensor]) -> None:
        if step != self._step:
            self._step, self._step_batches, self._random = step, [], random_states()
            self._failed, self._returned = False, torch.zeros((), device=next(iter(batch.values())).device)
        self._step_batches.append(batch)

    def _repeat(self, compute: Compute, zero_grad: Callable[[], None]) -> list[Tensor] | None:
        self._halve()
        zero_grad()
        set_random_states(self._random)
        return self._try_compute(self._step_batches, compute)

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
        (size,) = distributed.all_reduce_max(min(self.size or largest, largest))
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


# `batch.auto`: the micro-batch size for this GPU.


def auto_batch_size(experiment: Experiment, run: Run, site: Site) -> Experiment:
    """With `batch.auto`, return the experiment with the largest micro-batch that fits the smallest GPU, and log it.

    Sizes that ran out of memory on this GPU model are not tried again. Without GPUs or `batch.auto`, the experiment is
    returned unchanged. All ranks must call it; rank 0 decides.

    Raises:
        UserError: not even a single row fits.
    """
    config = experiment.config
    if not config.batch.auto:
        return experiment
    capacity = -distributed.all_reduce_max(-(gpu_memory_bytes() or 0))[0]
    if not capacity:
        return experiment
    cut = distributed.broadcast_object(_choose(config, run, site, capacity) if log.is_main_process() else None)
    assert cut is not None
    if isinstance(cut, UserError):
        raise cut
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


def _choose(config: Config, run: Run, site: Site, capacity: int) -> BatchPlan | UserError:
    try:
        folder = find_model(config.model, site)
        model = build_meta_model(folder, config)
        rows, _ = longest_row(config, site, folder, model, run)
        return choose_batch_size(model, config, rows, int(MEMORY_SHARE * capacity), _largest_known_good(run))
    except UserError as error:  # for all ranks, which wait
        shared = " Or remove batch.auto: then the GPUs can share the model." if config.job.world_size > 1 else ""
        return UserError(error.problem, error.remedy + shared)


def record_oom(run: Run, size: int) -> None:
    """Log that memory ran out, and the new micro-batch size."""
    run.log_event("out of memory", micro_batch=size, gpu=gpu_name())
    log.warning(f"out of memory; repeating the step with micro-batches of {size}")


def _largest_known_good(run: Run) -> int | None:
    """Return the smallest micro-batch size logged after an out-of-memory error on this GPU model, or None."""
    lines = jsonl.read_jsonl_log(run.history)
    sizes = [line["micro_batch"] for line in lines if line["event"] == "out of memory" and line["gpu"] == gpu_name()]
    return min(sizes, default=None)
