"""Build transformers' TrainingArguments from a config, and describe them for the light install.

`python -m ftlib.training.arguments` prints the table that is stored in `ftlib/config/training_fields.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments, get_scheduler

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.core.gpu import gpu_name, has_bfloat16
from ftlib.errors import UserError
from ftlib.training.data import num_micro_batches
from ftlib.training.resume import TrainingPhase

_KIND = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules that step only on the Trainer's own evaluation, which ftlib does not use: the rate would stay constant."""

_CHOICES_OF_TEXT_FIELDS = {"train_sampling_strategy"}


def build_training_arguments(config: Config, output_dir: Path, phase: TrainingPhase) -> TrainingArguments:
    """Return the TrainingArguments of a phase: the user's fields, and those that ftlib sets itself.

    Raises:
        UserError: transformers rejects a value, lacks a field or needs a missing package, or ftlib's loop does not
            support a setting.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    missing = sorted(set(config.training) - known)
    if missing:
        raise UserError(f"training.{missing[0]}: transformers {transformers.__version__} has no such field")
    _check_numbers(config)
    if (schedule := config.training.get("lr_scheduler_type")) in _BY_EVALUATION:
        problem = (
            f"training.lr_scheduler_type: {schedule} depends on the Trainer's own evaluation, which ftlib does not use"
        )
        raise UserError(f"{problem}: the learning rate would stay constant", "Use another schedule, such as cosine.")
    if (config.training.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise UserError("training: with use_reentrant: true, frozen inputs get no gradients", "Remove it.")
    _check_loading(config)
    _, world = log.rank_and_world_size()
    own = {
        "gradient_accumulation_steps": num_micro_batches(config.effective_batch_size, config.micro_batch_size, world),
        "ddp_find_unused_parameters": config.training.get("ddp_find_unused_parameters", False),
        "bf16": config.autocast == "bf16",
        # without a GPU, accelerate joins ranks and transformers computes in bfloat16 only with use_cpu=True
        "use_cpu": config.training.get("use_cpu", False)
        or (not torch.cuda.is_available() and (world > 1 or config.autocast == "bf16")),
    }
    try:
        built = TrainingArguments(
            **{**_workers(config), **config.training, **own, "learning_rate": learning_rate(config, phase)},
            output_dir=str(output_dir),
            seed=phase.seed(config.seed),
            data_seed=phase.seed(config.seed),
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: transformers rejects these settings: {error}") from None
    _check_optimizer(built, config)
    if built.n_gpu > 1:
        log.warning(f"using 1 of {built.n_gpu} visible GPUs; set `job: {{gpus: {built.n_gpu}}}` to use all")
        built._n_gpu = 1  # transformers would use DataParallel, which averages the losses wrongly
    return built


def _check_optimizer(built: TrainingArguments, config: Config) -> None:
    """Check before the model is loaded that optimizer and schedule can be created.

    Raises:
        UserError: a package or a setting that they need is missing, or a setting would be ignored.
    """
    name, schedule = built.optim.value, built.lr_scheduler_type.value
    if built.weight_decay and re.match("galore|apollo", name):
        raise UserError(f"training.weight_decay: transformers does not pass it to {name}", "Remove it, or set it to 0.")
    if any(one.weight_decay for one in config.parts.values()) and re.match("galore|apollo", name):
        raise UserError(f"parts: transformers passes no weight decay to {name}", "Remove weight_decay.")
    plain = copy.copy(built)
    plain.optim_target_modules = built.optim_target_modules and "all-linear"  # the model is not loaded yet
    layer = torch.nn.Linear(1, 1, device="meta")  # draws no random numbers
    try:
        Trainer.get_optimizer_cls_and_kwargs(plain, torch.nn.Sequential(layer))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"training.optim: {name}: {error}") from None
    _allow_projection_unpickling(name)
    try:
        get_scheduler(schedule, torch.optim.SGD(layer.parameters()), 1, 100, built.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"training.lr_scheduler_type: {schedule}: {error}", "See lr_scheduler_kwargs.") from None


def _allow_projection_unpickling(optimizer: str) -> None:
    """Allow torch.load to unpickle the projectors in low-rank optimizers' states; resuming needs them."""
    if "galore" in optimizer:
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])
    elif "apollo" in optimizer:
        from apollo_torch.random_projector import GradientProjector
        from apollo_torch.svd_projector import GaLoreProjector as SingularProjector

        torch.serialization.add_safe_globals([GradientProjector, SingularProjector])


def _check_loading(config: Config) -> None:
    workers = config.training.get("dataloader_num_workers", _workers(config).get("dataloader_num_workers", 0))
    for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
        if config.training.get(name) and not workers:
            raise UserError(f"training.{name} has no effect without workers", "Set dataloader_num_workers too.")


def learning_rate(config: Config, phase: TrainingPhase) -> float:
    """Return the peak learning rate of a phase's schedule."""
    own = config.rounds[phase.round].learning_rate if config.rounds else config.training.get("learning_rate")
    start = TrainingArguments.learning_rate if own is None else own
    return float(start * config.guard.learning_rate_factor**phase.attempt)


def _check_numbers(config: Config) -> None:
    """Reject a precision that this machine does not support; a silent fallback would change the result.

    Raises:
        UserError: bf16 on a CPU without `use_cpu`, fp16 or Triton kernels on a CPU, `use_cpu` although there is a GPU,
            bfloat16 on a GPU older than Ampere.
    """
    training = config.training
    on_cpu = not torch.cuda.is_available()
    if training.get("use_cpu") and not on_cpu:
        problem = "training.use_cpu: torch sees a GPU, and models and tasks would still use it"
        raise UserError(problem, "To train on the CPU, hide it: set CUDA_VISIBLE_DEVICES= (to nothing) for the job.")
    if on_cpu and training.get("fp16"):
        raise UserError("training.fp16 needs a GPU, and training is on the CPU", "Remove it, or use training.bf16.")
    if on_cpu and training.get("use_liger_kernel"):
        raise UserError("training.use_liger_kernel needs a GPU, and training is on the CPU", "Remove it.")
    if on_cpu and training.get("bf16") and not training.get("use_cpu"):
        raise UserError(
            "training.bf16: torch sees no GPU", "To train on the CPU on purpose, set training.use_cpu: true."
        )
    bfloat16 = bool(training.get("bf16")) or config.model.dtype == "bfloat16"
    if bfloat16 and not on_cpu and not has_bfloat16():
        problem = f"{gpu_name()} cannot compute in bfloat16 (Ampere and newer can)"
        raise UserError(problem, "Set model.dtype: float16 and training.fp16: true instead; that is another run.")


def _workers(config: Config) -> dict[str, Any]:
    """Return the default DataLoader settings: on a GPU all but one of the job's CPUs load data; on a CPU no workers."""
    if not torch.cuda.is_available() or "dataloader_num_workers" in config.training:
        return {}
    cpus = min(config.job.cpus, len(os.sched_getaffinity(0)))
    if cpus < 2:
        return {}
    return {"dataloader_num_workers": cpus - 1, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True}


def describe() -> dict[str, dict[str, Any]]:
    """Return name → types, choices and default of every TrainingArguments field of the installed transformers."""
    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: _describe(hints[field.name], field.default) for field in dataclasses.fields(TrainingArguments)}


def _describe(hint: Any, default: Any) -> dict[str, Any]:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds, choices = set(), []
    for member in members:
        base = typing.get_origin(member) or member
        if isinstance(base, type) and issubclass(base, enum.Enum):
            kinds.add("text")
            choices += [item.value for item in base]
        elif base in _KIND:
            kinds.add(_KIND[base])
    entry: dict[str, Any] = {"types": sorted(kinds)}
    if choices:
        entry["choices"] = sorted(choices)
    default = default.value if isinstance(default, enum.Enum) else default
    if isinstance(default, (bool, int, float, str)):
        entry["default"] = default
    return entry


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
