"""Checkpoints: written when it is time, complete or not at all, with what is needed to resume exactly.

That is trained weights, optimizer, scheduler, random states and the thread count; `files.atomic_directory` adds
COMPLETE.json, without which a folder is no checkpoint. Which ones are kept: `runs/run.py`; where a run resumes:
`training/resume.py`.

Weights are stored under the module's own parameter names and only if they train, so that the same file serves
adapters, full fine-tuning and frozen parts. (transformers' own checkpoints of a full PaliGemma carry other names than
the module and are loaded with strict=False: such a run goes on from its initial weights without a word.)
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlib.config.schema import Checkpoint
from ftlib.core import files, signals
from ftlib.training import distributed

_WEIGHTS_FILE = "trainable.safetensors"
_METADATA_FILE = "ftlib.json"


def write_checkpoint(trainer: Trainer, target: Path, metadata: dict[str, Any]) -> None:
    """Write the folder `target`; called by all ranks, of which each adds its random states and the first the rest.

    Args:
        metadata: what `read_metadata` is to return.
    """
    if trainer.is_world_process_zero():
        with files.atomic_directory(target) as folder:
            save_trainable_parameters(trainer.model, folder, metadata)
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(distributed.broadcast_object(str(folder)))
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            distributed.barrier()
        signals.notify_host("checkpointed")
    else:
        trainer._save_rng_state(distributed.broadcast_object(""))
        distributed.barrier()
    distributed.barrier()


def save_trainable_parameters(model: torch.nn.Module, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the trainable parameters, the number of threads that shaped their bits, and facts of the caller's."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, folder / _WEIGHTS_FILE)
    files.write_json(folder / _METADATA_FILE, {"threads": torch.get_num_threads(), **metadata})


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `save_trainable_parameters` was told, and the number of threads."""
    facts: dict[str, Any] = files.read_json(folder / _METADATA_FILE)
    return facts


def load_trainable_parameters(model: torch.nn.Module, folder: Path) -> None:
    """Put saved parameters back, in place.

    Raises:
        RuntimeError: the names in the checkpoint are not exactly the trainable ones.
    """
    weights = load_file(folder / _WEIGHTS_FILE)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(weights) != set(parameters):
        wrong = sorted(set(weights) ^ set(parameters))
        raise RuntimeError(f"{folder}: does not fit the model: {len(wrong)} parameters differ, such as {wrong[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


@contextlib.contextmanager
def keep_optimizer_paged(optimizer: Any) -> Iterator[None]:
    """Inside, an optimizer's state is loaded; that of a paged one (bitsandbytes) is paged afterwards as it was before.

    bitsandbytes would load all of it into the GPU's memory, where it may not fit, and leave it there.

    Args:
        optimizer: accelerate's wrapper of it, or itself.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
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
    """Compute with as many threads as the checkpoint did: another number sums in another order."""
    torch.set_num_threads(read_metadata(folder)["threads"])


def pending_signal_number() -> int:
    """The number of the signal that asked this process to end, or 0."""
    name = signals.pending_signal()
    return signal.Signals[name].value if name else 0


def checkpoint_bytes(
    model: torch.nn.Module, optimizer: str, whole: bool, checkpoints: int, saved: torch.dtype | None = None
) -> int:
    """The least number of bytes that so many checkpoints and the result will take.

    A checkpoint holds the trainable weights and, for the Adam family, two moments of the same type for each of them.

    Args:
        optimizer: training.optim.
        whole: the result is a whole model, not an adapter.
        saved: the type that trainable weights have in the result; None: that which they train in.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() * p.element_size() for p in trained)
    result = sum(p.numel() * (saved or p.dtype).itemsize for p in trained)
    if whole:
        result += sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    moments = 2 if "adam" in optimizer and "bit" not in optimizer else 0
    return checkpoints * trainable * (1 + moments) + result


class CheckpointCallback(TrainerCallback):
    """Asks the Trainer to save when enough steps or minutes have passed or valid is to be asked.

    On a signal it asks to save and stop. All ranks do so after the same step.
    """

    def __init__(self, rule: Checkpoint) -> None:
        self.rule = rule
        self._saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
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
