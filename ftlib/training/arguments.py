"""transformers' TrainingArguments: built from a config, and described for the light install.

`python -m ftlib.training.arguments` prints the table that stands in `ftlib/training_fields.json`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from ftlib.config import Config
from ftlib.errors import UserError

_KIND = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
_CHOICES_OF_TEXT_FIELDS = {"train_sampling_strategy"}


def build(config: Config, output_dir: Path) -> TrainingArguments:
    """TrainingArguments for a run: the user's fields, and those that ftlib owns.

    Raises:
        UserError: transformers refuses a value, or this version of it lacks a field.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    missing = sorted(set(config.training) - known)
    if missing:
        raise UserError(f"training.{missing[0]}: transformers {transformers.__version__} here has no such field")
    try:
        return TrainingArguments(
            **{**_workers(config), **config.training},
            output_dir=str(output_dir),
            seed=config.seed,
            data_seed=config.seed,
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
        raise UserError(f"training: transformers refuses these settings: {error}") from None


def _workers(config: Config) -> dict[str, Any]:
    """On a GPU all but one of the job's CPUs prepare batches ahead; without one they are needed for computing."""
    if not torch.cuda.is_available() or "dataloader_num_workers" in config.training:
        return {}
    cpus = min(config.job.cpus, len(os.sched_getaffinity(0)))
    if cpus < 2:
        return {}
    return {"dataloader_num_workers": cpus - 1, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True}


def describe() -> dict[str, dict[str, Any]]:
    """Name → types and choices of every TrainingArguments field of the installed transformers."""
    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: _describe(hints[field.name]) for field in dataclasses.fields(TrainingArguments)}


def _describe(hint: Any) -> dict[str, Any]:
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
    return entry


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
