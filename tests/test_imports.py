"""Importing ftlib changes nothing in the process that imports it."""

from __future__ import annotations

import os
import subprocess
import sys

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
