"""Write and read checkpoints: atomic, with everything that an exact resume needs.

A checkpoint holds the trained weights, optimizer, scheduler, RNG states and the thread count.
`files.atomic_directory` adds COMPLETE.json; a folder without it is not a checkpoint. `runs/run.py` decides which
checkpoints are kept; `training/resume.py` where a run resumes, and it deletes later ones; `training/train.py` deletes
those of an attempt that diverged.

Only trainable parameters are stored, under the module's own parameter names, so that the same format serves
adapters, full fine-tuning and frozen parts. Of a sharded model whole tensors are stored: the format is the same, and
any number of processes can resume from it, with sharding or without. (transformers' own checkpoints of a fully trained
PaliGemma use other names than the module and are loaded with strict=False: such a run would silently resume from its
initial weights.)
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlib.config.schema import Checkpoint
from ftlib.core import files, signals
from ftlib.models import sharding
from ftlib.training import distributed

_WEIGHTS_FILE = "trainable.safetensors"
_METADATA_FILE = "ftlib.json"
_OPTIMIZER_FILE, _SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
"""The Trainer's names."""


def write_checkpoint(trainer: Trainer, target: Path, metadata: dict[str, Any]) -> None:
    """Write a checkpoint to `target`. All ranks must call it: each writes its RNG state, rank 0 everything else.

    Of a sharded model rank 0 gathers one tensor at a time.

    Args:
        metadata: returned by `read_metadata`.
    """
    main = trainer.is_world_process_zero()
    if main:
        with files.atomic_directory(target) as folder:
            save_trainable_parameters(trainer.model, folder, metadata)
            _save_optimizer_and_scheduler(trainer, folder)
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(distributed.broadcast_object(str(folder)))
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            distributed.barrier()
        signals.notify_host("checkpointed")
    else:
        save_trainable_parameters(trainer.model, None, metadata)
        _save_optimizer_and_scheduler(trainer, None)
        there = distributed.broadcast_object("")
        with files.storage_errors(Path(there)):
            trainer._save_rng_state(there)
        distributed.barrier()
    distributed.barrier()
    signals.mark_resumable()


def save_trainable_parameters(model: torch.nn.Module, folder: Path | None, metadata: dict[str, Any]) -> None:
    """Write the trainable parameters, and `metadata` with the number of CPU threads. All ranks must call it.

    Args:
        folder: None on ranks that do not write.
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    sharding.write_tensors(trained, folder / _WEIGHTS_FILE if folder else None, {})
    if folder:
        files.write_json(folder / _METADATA_FILE, {"threads": torch.get_num_threads(), **metadata})


def _save_optimizer_and_scheduler(trainer: Trainer, folder: Path | None) -> None:
    if sharding.trains_shards(trainer.model):
        sharding.write_optimizer_state(_plain(trainer.optimizer), folder / _OPTIMIZER_FILE if folder else None)
        if folder:
            torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER_FILE)
    elif folder:
        trainer._save_optimizer_and_scheduler(str(folder))


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata given to `save_trainable_parameters`, with the number of threads."""
    facts: dict[str, Any] = files.read_json(folder / _METADATA_FILE)
    return facts


def load_trainable_parameters(model: torch.nn.Module, folder: Path) -> None:
    """Load saved parameters into the model, in place; of a sharded parameter this rank's part.

    Raises:
        RuntimeError: the names in the checkpoint are not exactly the trainable ones.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(folder / _WEIGHTS_FILE, framework="pt") as weights, torch.no_grad():
        if wrong := sorted(set(weights.keys()) ^ set(parameters)):
            problem = f"does not match the model: {len(wrong)} parameters differ, such as {wrong[0]}"
            raise RuntimeError(f"{folder}: {problem}")
        for name, parameter in parameters.items():
            whole = weights.get_tensor(name)
            if whole.shape != parameter.shape:
                raise RuntimeError(f"{folder}: {name} has shape {[*whole.shape]}, here {[*parameter.shape]}")
            parameter.copy_(sharding.own_part(whole, parameter))


def load_optimizer_and_scheduler(trainer: Trainer, folder: Path) -> None:
    """Load the states of an optimizer of sharded parameters, and of the scheduler.

    The file is mapped into memory, so that ranks of a node share its pages instead of each reading all of it.
    """
    state = torch.load(folder / _OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
    sharding.load_optimizer_state(_plain(trainer.optimizer), state)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER_FILE, weights_only=True))


def _plain(optimizer: Any) -> Any:
    """Return the optimizer in accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextlib.contextmanager
def keep_optimizer_paged(optimizer: Any) -> Iterator[None]:
    """Context in which the state of a paged optimizer (bitsandbytes) is loaded and stays paged.

    bitsandbytes itself would load all of it into GPU memory, where it may not fit, and leave it there.

    Args:
        optimizer: the optimizer, or accelerate's wrapper of it.
    """
    plain = _plain(optimizer)
    if not getattr(plain, "is_paged", False):
        yield
        return
    plain.load_state_dict = partial(plain.load_state_dict, move_to_device=False)
    try:
        yield
    finally:
        del plain.load_state_dict
    for parameter, state in plain.state.items():
        for name, value in state.items():
            if name in ("state1", "state2"):
                state[name] = plain.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                state[name] = value.to(parameter.device)


def restore_threads(folder: Path) -> None:
    """Set the number of CPU threads that the checkpoint was written with: it determines the order of sums."""
    torch.set_num_threads(read_metadata(folder)["threads"])


def pending_signal_number() -> int:
    """Return the number of the signal that asked this process to stop, or 0."""
    name = signals.pending_signal()
    return signal.Signals[name].value if name else 0


def checkpoint_bytes(
    model: torch.nn.Module, optimizer: str, whole: bool, checkpoints: int, saved: torch.dtype | None = None
) -> int:
    """Return a lower bound of the bytes that the given number of checkpoints and the result need.

    A checkpoint holds the trainable weights and, for the Adam family, two moments of the same dtype for each of them.

    Args:
        optimizer: training.optim.
        whole: whether the result is a whole model, not an adapter.
        saved: the dtype of trainable weights in the result; None: the dtype that they train in.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() * p.element_size() for p in trained)
    result = sum(p.numel() * (saved or p.dtype).itemsize for p in trained)
    if whole:
        result += sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    moments = 2 if "adam" in optimizer and "bit" not in optimizer else 0
    return checkpoints * trainable * (1 + moments) + result


class CheckpointCallback(TrainerCallback):
    """Tells the Trainer to save when enough steps or minutes have passed or an evaluation is due.

    After a signal the Trainer saves and stops. All ranks do so after the same step.
    """

    def __init__(self, rule: Checkpoint) -> None:
        self.rule = rule
        self._saved_at = time.monotonic()
        self._first_step = 0.0
        self._steps = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._first_step = self._first_step or time.time()
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._steps += 1
        if self._steps.bit_count() == 1:  # of steps 1, 2, 4, 8, …
            seconds = math.ceil((time.time() - self._first_step) / self._steps)
            signals.notify_host("pace", f"{int(self._first_step)} {seconds}\n")
        overdue = time.monotonic() - self._saved_at >= self.rule.minutes * 60
        signalled, late = distributed.all_reduce_max(pending_signal_number(), overdue)
        steps = [self.rule.steps, *([self.rule.best.every] if self.rule.best else [])]
        if late or state.global_step >= state.max_steps or any(state.global_step % every == 0 for every in steps):
            control.should_save = True
        if signalled:
            signals.adopt_remote_signal(signal.Signals(signalled).name)
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()
