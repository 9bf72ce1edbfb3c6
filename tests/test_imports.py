"""Importing ftlib changes nothing in the process that imports it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import LORA
from tests.test_architecture import modules

IMPORTS_ALL = """
import importlib, logging, os, signal, sys, warnings
import accelerate, bitsandbytes, datasets, huggingface_hub, peft, PIL.Image, rich, submitit, torch, transformers
import torch.distributed, torch._dynamo, torch._inductor.config
from transformers.utils import logging as transformers_logging
from transformers import AutoModelForCausalLM, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, Trainer

PACKAGES = ("transformers", "peft", "datasets", "huggingface_hub", "warnings", "logging", "PIL")

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(theirs))]
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "loggers": [(one.name, one.level, list(one.handlers), one.propagate, list(one.filters)) for one in loggers],
        "bars": transformers_logging.is_progress_bar_enabled(),
        "offline": (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                  torch.are_deterministic_algorithms_enabled(), torch.initial_seed(), torch.is_grad_enabled(),
                  torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.matmul.allow_tf32),
        "umask": (old := os.umask(0), os.umask(old))[0],
        "patched": {(name, key): value for name in theirs_modules for key, value in vars(sys.modules[name]).items()
                    if callable(value) or isinstance(value, (bool, int, float, str, type(None)))},
    }

theirs = set(logging.root.manager.loggerDict)
theirs_modules = [name for name, module in list(sys.modules.items())
                  if name.split(".")[0] in PACKAGES and type(module).__name__ == "module"]
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
for key in before:
    if before[key] != after[key]:
        print(key, {n for n in before[key] | after[key] if before[key].get(n) != after[key].get(n)}
              if isinstance(before[key], dict) else before[key])
own = logging.getLogger("ftlib")
print([type(handler).__name__ for handler in own.handlers], own.level, own.propagate)
"""


def test_importing_every_module_changes_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_ALL, *modules()], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['NullHandler'] 0 True\n"


def imported_by(*command: object) -> set[str]:
    """The packages of which a command imports parts, in a process of its own. (One that is not found has no parts.)"""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ftlib", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ftlib.cli.main" in found
    return {name.partition(".")[0] for name in found if "." in name}


def test_commands_import_only_what_they_need(store: Path, write_config: Callable[..., Path]) -> None:
    """torch and transformers take seconds at every start, bitsandbytes two more."""
    config = write_config(LORA, replace=("max_steps: 12", "max_steps: 1"))
    large = {"torch", "transformers", "peft", "accelerate", "datasets", "scipy"}
    assert not imported_by("stage", config) & large, "a local model"
    assert "torch" not in imported_by("prepare", config)
    for command in ("train", "evaluate"):
        found = imported_by(command, config)
        assert "peft" in found and not {"bitsandbytes", "datasets", "pandas", "scipy", "sklearn"} & found, command
    for command in ("stage", "prepare", "train", "evaluate"):
        assert not imported_by(command, config) & large, f"{command} of what is done"
    for words in (["status"], ["submit", "--dry-run", config]):
        assert not imported_by(*words) & large, words
