"""The generated table of TrainingArguments, and how they are built."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import training_fields
from ftlib.config import Config
from ftlib.config_file import load_experiment
from ftlib.errors import UserError
from ftlib.site import Site
from ftlib.training import arguments


def config(path: Path, *overrides: str) -> Config:
    return load_experiment(path, overrides, Site(Path("/s"), Path("/r")), {}).config


def test_the_table_is_what_the_installed_transformers_has() -> None:
    assert json.loads(training_fields.TABLE.read_text()) == arguments.describe(), "run `make fields`"


def test_the_hand_kept_rules_name_real_fields() -> None:
    table = set(training_fields.table())
    assert set(training_fields.OWNED) <= table
    assert set(training_fields.POSITIVE + training_fields.NOT_NEGATIVE + training_fields.NOT_IN_RESULT) <= table
    assert not set(training_fields.REMOVED) & table


def test_values_reach_the_trainer(write_config: Callable[..., Path], tmp_path: Path) -> None:
    built = arguments.build(config(write_config(), "training.weight_decay=0.25", "training.optim=sgd"), tmp_path)
    assert (built.weight_decay, built.optim, built.seed, built.max_steps) == (0.25, "sgd", 3, 12)
    assert not built.logging_nan_inf_filter


def test_what_transformers_refuses_is_the_users_mistake(write_config: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers refuses these settings"):
        arguments.build(
            config(write_config(), "training.optim_args=nonsense", "training.fp16=true", "training.bf16=true"), tmp_path
        )
