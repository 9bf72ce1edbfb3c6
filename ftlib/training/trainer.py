"""transformers' Trainer with ftlib's batches, loss, log and checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlib import files, preemption, runs
from ftlib.config import Config
from ftlib.errors import Diverged
from ftlib.training.batching import EffectiveBatches, TrainingRows
from ftlib.training.checkpoints import CheckpointDue, load_trainable, save_trainable
from ftlib.training.halving import Halving
from ftlib.training.lengths import FewShapes, compile_each_shape
from ftlib.training.loss import answer_loss, count_items

OnStep = Callable[[dict[str, Any], int], None]
"""Called after every optimizer step with its record and the number of steps in all."""


class AnswerTrainer(Trainer):
    """A Trainer for rows that end in an answer.

    Args:
        config: the experiment.
        model: with its trainable parameters marked.
        rows: the training split.
        arguments: from `arguments.build`.
        checkpoints: the folder that checkpoints go to.

    Set `on_step` to get {"step", "epoch", "loss", "learning_rate", "grad_norm", "seconds"} after each step.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        rows: TrainingRows,
        arguments: TrainingArguments,
        checkpoints: Path,
    ) -> None:
        static = arguments.torch_compile and not config.loss.packing
        lengths = rows.lengths() if static or config.micro_batch < config.effective_batch else None
        collate = FewShapes(rows.inputs, _labelled(lengths, config)) if static and lengths else rows.inputs.batch
        if static:
            compile_each_shape()
        super().__init__(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        self.config = config
        self.checkpoints = checkpoints
        self.on_step: OnStep = lambda record, total: None
        self.halving = Halving()
        self.model_accepts_loss_kwargs = True
        self._batches = EffectiveBatches(
            rows=len(rows),
            effective=config.effective_batch,
            micro=config.micro_batch,
            seed=config.seed,
            drop_last=arguments.dataloader_drop_last,
            lengths=[tokens for tokens, _ in lengths] if lengths else None,
        )
        self.add_callback(CheckpointDue(config.checkpoint))
        self.add_callback(_EpochOrder(self._batches))
        self._last_step_at = time.monotonic()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Rows in the order that (seed, epoch) gives."""
        arguments = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            worker_init_fn=_deaf,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows in an epoch."""
        return self._batches.rows

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """What the loss of the whole effective batch is divided by, in every micro-batch of it."""
        counts = [count_items(batch["labels"], self.config.loss.average) for batch in batch_samples]
        return torch.stack(counts).sum().to(device)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, with `batch.auto` in smaller pieces when memory runs out."""
        if not self.config.batch.auto:
            return super().training_step(model, inputs, num_items_in_batch)
        compute = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        return self.halving.run(self.state.global_step, inputs, compute, model.zero_grad)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's part of the effective batch's loss."""
        loss = self.config.loss
        return answer_loss(model, inputs, loss.average, num_items_in_batch, loss.label_smoothing)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called by the Trainer after every step (and once at the end, without a loss).

        Raises:
            Diverged: loss or gradient is no finite number.
        """
        if "loss" not in logs:
            return
        now = time.monotonic()
        step, seconds = self.state.global_step, now - self._last_step_at
        record = {"step": step, "epoch": self.state.epoch, **logs, "seconds": seconds}
        self._last_step_at = now
        # With fp16 an infinite gradient is daily work: the scaler skips that step and halves its scale.
        norm = 0.0 if self.args.fp16 else logs.get("grad_norm", 0.0)
        if not (math.isfinite(logs["loss"]) and math.isfinite(norm)):
            raise Diverged(f"step {step}: loss {logs['loss']}, gradient norm {logs.get('grad_norm')}")
        self.on_step(record, self.state.max_steps)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with files.publish_folder(runs.checkpoint_folder(self.checkpoints, self.state.global_step)) as folder:
            save_trainable(self.model, folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
        preemption.tell_host("checkpointed")
        runs.rotate_checkpoints(self.checkpoints, self.config.checkpoint.keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))


def _labelled(lengths: list[tuple[int, int]], config: Config) -> list[tuple[int, int]]:
    """Where everything is learned, all tokens but the first carry labels."""
    return [(tokens, tokens - 1) for tokens, _ in lengths] if config.loss.on == "everything" else lengths


def _deaf(worker: int) -> None:
    """Slurm signals every process of a step; a worker that died of it would fail the run before it can save."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _EpochOrder(TrainerCallback):
    """Tells the batch sampler which epoch begins."""

    def __init__(self, batches: EffectiveBatches) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches.set_epoch(int(state.epoch or 0))
