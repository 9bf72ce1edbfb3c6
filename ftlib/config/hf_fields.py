"""Tables of transformers' TrainingArguments and GenerationConfig, to check configs without transformers."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# TrainingArguments.
#
# `training_fields.json` is generated from the newest supported transformers (`make fields`; a test compares them), so
# that a config can be checked without torch. The rules below are maintained by hand: fields that ftlib sets itself,
# removed names, bounds that transformers does not check, and fields that cannot change the result.

TABLE = Path(__file__).with_name("training_fields.json")

_USE_CHECKPOINT = "ftlib saves checkpoints itself: use checkpoint.steps, checkpoint.minutes and checkpoint.keep"
_USE_EVALUATION = "evaluation is by generation: use evaluation.splits and `ftlib evaluate`"
_STEPS = "every step is written to metrics.jsonl in the run folder"
_HUB = "nothing is uploaded while training"
_DISTRIBUTED = "ftlib starts one process per GPU itself"

OWNED: dict[str, str] = {
    "output_dir": "the run folder follows from name and config; set FTLIB_RUNS for its root",
    "seed": "use the top-level seed",
    "data_seed": "use the top-level seed",
    "run_name": "use the top-level name",
    "save_strategy": _USE_CHECKPOINT,
    "save_steps": _USE_CHECKPOINT,
    "save_total_limit": _USE_CHECKPOINT,
    "save_only_model": _USE_CHECKPOINT,
    "save_on_each_node": _USE_CHECKPOINT,
    "enable_jit_checkpoint": _USE_CHECKPOINT,
    "restore_callback_states_from_checkpoint": _USE_CHECKPOINT,
    "resume_from_checkpoint": "running the same config again resumes",
    "ignore_data_skip": "a resumed run always skips the rows that it has seen",
    "eval_strategy": _USE_EVALUATION,
    "eval_steps": _USE_EVALUATION,
    "eval_delay": _USE_EVALUATION,
    "eval_on_start": _USE_EVALUATION,
    "eval_accumulation_steps": _USE_EVALUATION,
    "eval_do_concat_batches": _USE_EVALUATION,
    "eval_use_gather_object": _USE_EVALUATION,
    "per_device_eval_batch_size": "use evaluation.batch_size",
    "prediction_loss_only": _USE_EVALUATION,
    "batch_eval_metrics": _USE_EVALUATION,
    "include_for_metrics": _USE_EVALUATION,
    "load_best_model_at_end": _USE_EVALUATION,
    "metric_for_best_model": _USE_EVALUATION,
    "greater_is_better": _USE_EVALUATION,
    "bf16_full_eval": _USE_EVALUATION,
    "fp16_full_eval": _USE_EVALUATION,
    "do_train": "use `ftlib train`",
    "do_eval": "use `ftlib evaluate`",
    "do_predict": "use `ftlib predict`",
    "logging_strategy": _STEPS,
    "logging_steps": _STEPS,
    "logging_first_step": _STEPS,
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "log_level": _STEPS,
    "log_level_replica": _STEPS,
    "log_on_each_node": _STEPS,
    "disable_tqdm": "progress is always shown: a bar on a terminal, lines in a file",
    "report_to": _STEPS,
    "project": _STEPS,
    "trackio_space_id": _STEPS,
    "trackio_bucket_id": _STEPS,
    "trackio_static_space_id": _STEPS,
    "include_num_input_tokens_seen": _STEPS,
    "skip_memory_metrics": _STEPS,
    "label_smoothing_factor": "use loss.label_smoothing; the Trainer's is not shifted for next-token labels",
    "label_names": "ftlib sets the names of the labels itself",
    "average_tokens_across_devices": "use loss.average",
    "auto_find_batch_size": "it would change the effective batch silently; set per_device_train_batch_size",
    "remove_unused_columns": "ftlib builds the batches itself",
    "activation_checkpointing": "write gradient_checkpointing",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    "train_sampling_strategy": "ftlib orders the rows itself, from seed",
    "length_column_name": "ftlib orders the rows itself, from seed",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "local_rank": _DISTRIBUTED,
    "fsdp": "not supported",
    "fsdp_config": "not supported",
    "deepspeed": "not supported",
    "parallelism_config": "not supported",
    "accelerator_config": "not supported",
}

REMOVED: dict[str, str] = {
    "warmup_ratio": "warmup_steps: a value below 1 is a share of all steps",
    "evaluation_strategy": "evaluation.splits and `ftlib evaluate`",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "no_cuda": "use_cpu",
    "fp16_backend": "fp16",
    "half_precision_backend": "bf16 or fp16",
    "overwrite_output_dir": "nothing; a changed config is a new run",
    "logging_dir": "nothing; metrics.jsonl is in the run folder",
    "group_by_length": "nothing; ftlib orders the rows itself",
    "torchdynamo": "torch_compile_backend",
    "include_tokens_per_second": "nothing; metrics.jsonl has the speed of every step",
    "save_safetensors": "nothing; weights are always saved as safetensors",
}

OPTIMIZERS_THAT_DO_NOT_RESUME: dict[str, str] = {
    "schedule_free": "saves weights that differ from those it trains",
    "lomo": "steps within the backward pass",
    "layerwise": "steps within the backward pass",
    "grokadamw": "does not save some of its averages in its state",
}
"""Part of an optimizer's name → why its runs cannot be resumed."""

FTLIB_TRAINING_FIELDS: dict[str, dict[str, Any]] = {"precision": {"types": ["text"], "choices": ["auto"]}}
"""Fields of ftlib in the `training:` section, in addition to those of TrainingArguments."""

POSITIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "dataloader_prefetch_factor",
)
NOT_NEGATIVE = (
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_num_workers",
    "ddp_timeout",
)
INT32_LIMIT = 2**31
"""Upper limit of integers, and of epochs."""
BELOW_ONE = ("adam_beta1", "adam_beta2")

NOT_IN_RESULT = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "ddp_timeout",
    "debug",
)
"""Fields that are never part of a run ID. Adding a name would rename existing runs that set it."""


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Return field name → {"types": type names, "choices" (optional): allowed values, "default" (optional)}."""
    fields: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return fields | FTLIB_TRAINING_FIELDS


def find_training_errors(training: dict[str, Any]) -> list[tuple[str, str]]:
    """Return all errors of a `training:` section as (field, error and remedy)."""
    found = []
    for name, value in training.items():
        fault = _name_error(name) or _type_error(name, value) or _bound_error(name, value)
        if fault:
            found.append((name, fault))
    return found


def fields_that_change_result(training: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that can change the trained weights."""
    return {name: value for name, value in training.items() if name not in NOT_IN_RESULT}


def _name_error(name: str) -> str | None:
    if name in OWNED:
        return f"ftlib sets this field itself: {OWNED[name]}"
    if name in REMOVED:
        return f"no longer exists in transformers; use {REMOVED[name]}"
    if name not in table():
        near = difflib.get_close_matches(name, set(table()) - set(OWNED), n=1)
        return "unknown key" + (f"; did you mean {near[0]}?" if near else "; not a field of TrainingArguments")
    return None


def _type_error(name: str, value: Any) -> str | None:
    entry = table()[name]
    if not any(_is(value, kind) for kind in entry["types"]):
        return f"must be {' or '.join(entry['types'])}, got {value!r:.200}"
    if "choices" in entry and isinstance(value, str) and value not in entry["choices"]:
        near = difflib.get_close_matches(value, entry["choices"], n=1)
        hint = f"did you mean {near[0]}?" if near else "one of: " + ", ".join(entry["choices"])
        return f"{value!r:.200} is not an allowed value; {hint}"
    for part, reason in OPTIMIZERS_THAT_DO_NOT_RESUME.items():
        if name == "optim" and part in str(value):
            return f"{value} {reason}, so runs could not be resumed; use another optimizer"
    return None


def _is(value: Any, kind: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "true or false": (bool,),
        "a whole number": (int,),
        "a number": (int, float),
        "text": (str,),
        "a list": (list,),
        "a mapping": (dict,),
        "null": (type(None),),
    }
    return isinstance(value, kinds[kind]) and (kind == "true or false" or not isinstance(value, bool))


def _bound_error(name: str, value: Any) -> str | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if abs(value) >= INT32_LIMIT and (isinstance(value, int) or name == "num_train_epochs"):
        return f"must be below {INT32_LIMIT}, got {value}"
    if name in POSITIVE and value <= 0:
        return f"must be greater than 0, got {value}"
    if name in NOT_NEGATIVE and value < 0:
        return f"must not be negative, got {value}"
    if name in BELOW_ONE and value >= 1:
        return f"must be below 1, got {value}"
    if name == "max_steps" and value < 1 and value != -1:
        return f"must be at least 1 (or -1: count epochs instead), got {value}"
    return None


_JSON_TYPES = {
    "true or false": "boolean",
    "a whole number": "integer",
    "a number": "number",
    "text": "string",
    "a list": "array",
    "a mapping": "object",
    "null": "null",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the `training:` section, for editors."""
    properties: dict[str, Any] = {}
    for name in sorted(set(table()) - set(OWNED)):
        entry = table()[name]
        schema: dict[str, Any] = {"type": [_JSON_TYPES[kind] for kind in entry["types"]]}
        if "choices" in entry:
            schema["enum"] = entry["choices"]
        if "default" in entry:
            schema["default"] = entry["default"]
        if name in POSITIVE:
            schema["exclusiveMinimum"] = 0
        elif name in NOT_NEGATIVE:
            schema["minimum"] = 0
        properties[name] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The fields of transformers' GenerationConfig that `evaluation.generation` accepts, with types and bounds.
#
# Maintained by hand, so that a config can be checked without transformers; a test compares it with the installed
# version. Fields that ftlib sets itself are missing (stop tokens, length, caches, return values).

FieldRule = tuple[type, float | None, float | None]
"""Field → (type, minimum, maximum)."""

_LARGEST = 2**31 - 1

_SAMPLING: dict[str, FieldRule] = {
    "temperature": (float, 0, None),
    "top_k": (int, 0, _LARGEST),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "epsilon_cutoff": (float, 0, 1),
    "eta_cutoff": (float, 0, 1),
}
"""Fields that only affect sampling."""

_OTHERS: dict[str, FieldRule] = {
    "do_sample": (bool, None, None),
    "repetition_penalty": (float, 0, None),
    "encoder_repetition_penalty": (float, 0, None),
    "length_penalty": (float, None, None),
    "early_stopping": (bool, None, None),
    "no_repeat_ngram_size": (int, 0, _LARGEST),
    "min_new_tokens": (int, 0, _LARGEST),
    "renormalize_logits": (bool, None, None),
    "remove_invalid_values": (bool, None, None),
    "seed": (int, 0, 2**32 - 1),
}

FIELDS: dict[str, FieldRule] = {**_SAMPLING, **_OTHERS}
FTLIB_GENERATION_FIELDS = ("seed",)
"""Fields of ftlib, which GenerationConfig does not have."""

_POSITIVE = ("temperature", "repetition_penalty", "encoder_repetition_penalty")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def find_generation_error(fields: Mapping[str, Any]) -> str | None:
    """Return the first error of a mapping of fields; None if it is valid."""
    for name, value in fields.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            return f"{name}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        if wrong := _value_error(name, value):
            return f"{name}: must be {wrong}, got {value!r:.200}"
    if idle := [name for name in fields if name in _SAMPLING and not fields.get("do_sample")]:
        return f"{idle[0]} has no effect without do_sample: true"
    return None


def _value_error(name: str, value: Any) -> str | None:
    kind, least, greatest = FIELDS[name]
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if type(value) not in accepted or not math.isfinite(value):
        return _WORDS[kind]
    if name in _POSITIVE and value <= 0:
        return "greater than 0"
    if least is not None and value < least:
        return f"at least {least}"
    if greatest is not None and value > greatest:
        return f"at most {greatest}"
    return None
