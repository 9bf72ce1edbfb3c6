"""Packages that a config asks for are looked for before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config import hf_fields
from ftlib.config.loader import load_experiment
from ftlib.config.packages import require_packages
from ftlib.core.paths import Site
from ftlib.errors import UserError

Ftlib = Callable[..., tuple[int, str, str]]
TORCHS = {"adafactor", "adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"}
"""Optimizers of torch and transformers."""
ELSEWHERE = {"adamw_anyprecision", "adamw_torch_npu_fused", "adamw_torch_xla"}
"""On no package index, or for other machines than GPUs; transformers says what they need."""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the optional packages is there."""
    find = importlib.util.find_spec
    optional = ("apollo_torch", "bitsandbytes", "galore_torch", "liger_kernel", "optimi", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in optional else find(name))


def test_one_line_installs_all_that_is_missing_before_anything_is_loaded(
    bare: None, store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    asked = ["training.use_liger_kernel=true", "training.optim=galore_adamw", "model.quantization=nf4"]
    code, _, error = ftlib("train", write_config("{method: lora}"), *asked)
    assert code == 2 and "prepare" not in error, "nothing is staged or prepared, which would be told next"
    assert "training.use_liger_kernel needs liger_kernel" in error
    assert "training.optim: galore_adamw needs galore_torch" in error
    assert "model.quantization: nf4 needs bitsandbytes" in error
    assert "pip install 'ftlib[quant]' 'ftlib[liger]' 'ftlib[optimizers]'" in error


def test_every_optimizer_is_known_refused_or_looked_for(bare: None, write_config: Callable[..., Path]) -> None:
    found = set()
    for name in hf_fields.table()["optim"]["choices"]:
        try:
            site = Site(Path("/s"), Path("/r"))
            require_packages(load_experiment(write_config(), [f"training.optim={name}"], site, {}).config)
        except UserError as error:
            assert "pip install" in error.remedy or "could not be resumed" in str(error), name
            found.add(name)
    assert set(hf_fields.table()["optim"]["choices"]) - found == TORCHS | ELSEWHERE


def test_what_is_there_is_not_missed(write_config: Callable[..., Path]) -> None:
    site = Site(Path("/s"), Path("/r"))
    for name in ("galore_adamw", "apollo_adamw", "stable_adamw", "paged_adamw_8bit", "sgd"):
        require_packages(load_experiment(write_config(), [f"training.optim={name}"], site, {}).config)
