"""The loop over training steps: transformers' Trainer with ftlib's batches, loss, log and checkpoints.

It trains one phase; `training/train.py` has the loops over phases and attempts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.errors import TrainingDiverged
from ftlib.models import sharding
from ftlib.models.adapters import no_decay_parameter_names, parameter_part, validate_packing
from ftlib.models.encoding import EncodedExample
from ftlib.models.loss import answer_loss, count_items, cut_labels
from ftlib.models.registry import ImageInputProcessor, InputProcessor
from ftlib.runs import run as runs
from ftlib.training import distributed
from ftlib.training.checkpoints import (
    CheckpointCallback,
    keep_optimizer_paged,
    load_optimizer_and_scheduler,
    load_trainable_parameters,
    write_checkpoint,
)
from ftlib.training.compiling import ContextFactory, prepare_to_compile
from ftlib.training.data import BucketedCollator, GlobalBatchSampler, SupervisedDataset
from ftlib.training.divergence import DivergenceDetector, require_finite
from ftlib.training.oom import MicroBatchSplitter
from ftlib.training.optimizer import has_own_settings, split_groups
from ftlib.training.resume import ResumePoint, TrainingPhase

OnStep = Callable[[dict[str, Any]], None]
"""Called after every optimizer step with its record."""

OnCheckpoint = Callable[[ResumePoint], bool]
"""Called after every checkpoint with its resume point; returns whether training ends there."""


class ResumableTrainer(Trainer):
    """Trains one phase of a run; resumes exactly from its checkpoints.

    Args:
        config: the config of the run.
        model: only trainable parameters have requires_grad.
        rows: the training split.
        arguments: from `arguments.build_training_arguments`.
        checkpoints: the folder for checkpoints.
        phase: attempt and round.
        mesh: the ranks over which the model is sharded, see `models/sharding.py`; None: every rank has all of it (DDP).

        Raises:
            UserError: `loss.packing` with a model that does not separate packed rows.

        Attributes:
            last_point: the newest checkpoint that was written.

    `on_step` is called after each step with {"step", "attempt", "round", "epoch", "loss", "learning_rate", "grad_norm",
    "seconds"}, on a GPU also "memory_gib", and "skipped": true if fp16's loss scaler skipped the step;
    "checkpoint_seconds" if a checkpoint was written after the step before. `step` counts through all rounds.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        rows: SupervisedDataset,
        arguments: TrainingArguments,
        checkpoints: Path,
        phase: TrainingPhase,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.mesh = mesh
        static = arguments.torch_compile and not config.loss.packing
        lengths = rows.lengths() if static or config.micro_batch_size < config.effective_batch_size else None
        collate = (
            BucketedCollator(rows.processor, _with_label_counts(lengths, config))
            if static and lengths
            else _Collator(rows.processor)
        )
        self._compiling: ContextFactory = contextlib.nullcontext
        if arguments.torch_compile:
            self._compiling = prepare_to_compile(
                config, len(collate.shapes) if isinstance(collate, BucketedCollator) else None
            )
        # With an explicit mask its backward pass can return NaN on Hopper GPUs (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        super().__init__(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        if config.loss.packing:
            with self.accelerator.autocast():
                validate_packing(model, rows.processor)
        self._replicated: list[torch.nn.Parameter] = []
        if mesh:
            self._replicated = sharding.replicated_parameters(model)
            sharding.shard(model, mesh, arguments.device)
        self.config = config
        self.checkpoints = checkpoints
        self.phase = phase
        self.last_point = ResumePoint(phase)
        self.on_step: OnStep = lambda record: None
        self.on_checkpoint: OnCheckpoint = lambda point: False
        self.splitter = MicroBatchSplitter()
        self.model_accepts_loss_kwargs = True
        self._batches = GlobalBatchSampler(
            sampler=rows.sampler,
            batch_size=config.effective_batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=arguments.seed,
            drop_last=arguments.dataloader_drop_last,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            lengths=[tokens for tokens, _ in lengths] if lengths else None,
        )
        self.add_callback(CheckpointCallback(config.checkpoint))
        self.add_callback(_EpochCallback(self._batches))
        self.detector = DivergenceDetector(config.guard, arguments.get_warmup_steps(self.total_steps), self.total_steps)
        self._last_step_at = time.monotonic()
        self._logged_rate_factor = 1.0
        self._saving: dict[str, float] = {}
        set_seed(arguments.seed + arguments.process_index)  # else all ranks would have the same dropout masks

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of this phase."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a DataLoader whose order of rows depends on (seed, epoch) only."""
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
            worker_init_fn=partial(_start_worker, log.verbosity()),
            generator=torch.Generator().manual_seed(arguments.seed),
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the number of rows per epoch."""
        return self._batches.rows

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the parameters to which `training.weight_decay` applies."""
        spared = no_decay_parameter_names(model)
        return [name for name, one in model.named_parameters() if one.requires_grad and name not in spared]

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Create the optimizer, with groups of parameters for `parts` and LoRA+."""
        made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer()
        if not made and has_own_settings(self.config):
            self._logged_rate_factor = split_groups(
                optimizer, self.model, self.config, self.get_decay_parameter_names(self.model)
            )
        return optimizer

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Leave a model that will be sharded where it is: sharding moves this rank's part of it."""
        if self.mesh is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *arguments: Any, **settings: Any) -> torch.nn.Module:
        """Return the model for the forward pass. A sharded one gets mixed precision only: accelerate, which leaves a
        prepared model alone, would wrap it for DDP.
        """
        if self.mesh is None:
            return super()._wrap_model(model, *arguments, **settings)
        sharding.broadcast_parameters(self._replicated)
        return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Return the divisor of the loss: the item count of the whole effective batch."""
        counts = [count_items(batch["labels"], self.config.loss.average) for batch in batch_samples]
        return distributed.all_reduce_sum(torch.stack(counts).sum().to(device, non_blocking=True))

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch on this process's device; the copy from pinned memory is asynchronous."""
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in inputs.items()}

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; with `batch.auto`, in smaller pieces if memory runs out."""
        compute = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        with self._compiling():
            if self.config.batch.auto and isinstance(model, DistributedDataParallel):
                return self._split_on_all_ranks(model, inputs, compute)
            if not self.config.batch.auto:
                loss = compute(inputs)
                if self._replicated and self.accelerator.sync_gradients:  # the last micro-batch of the step
                    sharding.average_gradients(self._replicated)
                return loss
            return self.splitter.run(self.state.global_step, inputs, compute, model.zero_grad)

    def _split_on_all_ranks(
        self, model: DistributedDataParallel, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]
    ) -> Tensor:
        """`training_step` with `batch.auto` on several ranks: DDP reduces nothing in the backward pass, where a rank
        without memory would leave the others waiting; gradients are averaged after the step's last micro-batch.
        """
        last = self.accelerator.sync_gradients
        with model.no_sync():
            loss = self.splitter.run_on_all_ranks(self.state.global_step, inputs, compute, model.zero_grad, last)
        if last:
            distributed.average_gradients([one for one in model.parameters() if one.requires_grad])
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return this micro-batch's share of the loss, times the number of ranks: DDP averages the gradients."""
        loss = self.config.loss
        without_images = self.config.model.entry.images and not any(name.startswith("pixel_values") for name in inputs)
        if without_images and self.mesh:
            # Weights are gathered block by block, by all ranks: those of the vision tower, too, if a rank has images.
            inputs = cast(ImageInputProcessor, self.train_dataset.processor).add_blank_image(inputs)
        part = answer_loss(model, inputs, loss.average, num_items_in_batch, loss.label_smoothing)
        if without_images and not self.mesh:
            # Without a gradient (even zero) for the vision tower, DDP would wait for ever for ranks with images, and
            # the optimizer would treat a step without images otherwise than one whose other ranks have some.
            part = part + sum((0.0 * parameter.flatten()[0].float() for parameter in self._vision_parameters), 0.0)
        return part * self.args.world_size

    @functools.cached_property
    def _vision_parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters that only images reach."""
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and parameter_part(self.model, name, self.config.model) in ("vision", "projector")
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called by the Trainer after every step (and once at the end, without a loss).

        Raises:
            TrainingDiverged: see `DivergenceDetector`.
        """
        if "loss" not in logs:
            return
        now = time.monotonic()
        point = {
            "step": self.phase.offset + self.state.global_step,
            "attempt": self.phase.attempt,
            "round": self.phase.round,
        }
        logs["learning_rate"] /= self._logged_rate_factor
        times = {"seconds": now - self._last_step_at, **self._saving}
        record = {**point, "epoch": self.state.epoch, **logs, **times, **_gpu_memory()}
        self._last_step_at, self._saving = now, {}
        skipped = self.accelerator.optimizer_step_was_skipped
        if skipped:
            record["skipped"] = True
        # With fp16 an infinite gradient is normal: the scaler skips the step and halves its scale.
        norm = 0.0 if self.args.fp16 else logs.get("grad_norm", 0.0)
        fault = self.detector.check(self.state.global_step, logs["loss"], norm, skipped)
        if math.isfinite(logs["loss"]) and math.isfinite(norm):
            self.on_step(record)
        if fault:
            raise TrainingDiverged(fault)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.phase.offset + self.state.global_step
        target = runs.checkpoint_folder(self.checkpoints, step)
        started = time.monotonic()
        require_finite(self.model)
        write_checkpoint(self, target, {"round": self.phase.round, "offset": self.phase.offset})
        self._saving = {"checkpoint_seconds": time.monotonic() - started}
        self.last_point = ResumePoint(self.phase, step, target)
        if self.on_checkpoint(self.last_point):
            self.control.should_training_stop = True
        self._last_step_at = time.monotonic()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trainable_parameters(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and sharding.trains_shards(self.model):
            load_optimizer_and_scheduler(self, Path(checkpoint))
            return
        with keep_optimizer_paged(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)


def _gpu_memory() -> dict[str, float]:
    """Return torch's peak reserved memory on this process's GPU; empty on a CPU."""
    return {"memory_gib": torch.cuda.max_memory_reserved() / 2**30} if torch.cuda.is_available() else {}


@dataclass(frozen=True)
class _Collator:
    """Collates rows into a training batch, on the CPU."""

    processor: InputProcessor

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        return cut_labels(self.processor.collate(rows))


def _with_label_counts(lengths: list[tuple[int, int]], config: Config) -> list[tuple[int, int]]:
    """Return the lengths with their label counts: with `loss.on: everything`, all tokens but the first."""
    return [(tokens, tokens - 1) for tokens, _ in lengths] if config.loss.on == "everything" else lengths


def _start_worker(verbosity: log.Verbosity | None, worker: int) -> None:
    """In a data-loading worker: ignore signals, and log as the training process, which a spawned one does not inherit.

    Slurm signals every process of a step; a worker that died of it would fail the run before it can save.
    """
    if verbosity:
        log.configure(verbosity)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _EpochCallback(TrainerCallback):
    """Sets the batch sampler's epoch."""

    def __init__(self, batches: GlobalBatchSampler) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches.set_epoch(int(state.epoch or 0))
