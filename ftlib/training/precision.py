"""`training.precision: auto`: the 16-bit type that a run computes in, chosen by the GPU of its first start."""

from __future__ import annotations

from dataclasses import replace

import torch

from ftlib import console, files
from ftlib.config import Config
from ftlib.config_file import Experiment
from ftlib.errors import UserError
from ftlib.runs import Run
from ftlib.training import ranks

_BF16_SINCE = (8, 0)
"""The compute capability that has bfloat16 in hardware: Ampere."""


def with_precision(experiment: Experiment, run: Run) -> Experiment:
    """With `training.precision: auto`, the experiment with `bf16` or `fp16` instead, noted in the run's history.

    All ranks must call it; the first one's GPU decides.

    Raises:
        UserError: no GPU, the run began in the other type, or the weights are of the other type.
    """
    config = experiment.config
    if "precision" not in config.training:
        return experiment
    mode = ranks.share(_mode(config, run) if console.speaks() else "")
    training = {name: value for name, value in config.training.items() if name != "precision"}
    return replace(experiment, config=config.model_copy(update={"training": {**training, mode: True}}))


def _mode(config: Config, run: Run) -> str:
    if not torch.cuda.is_available():
        raise UserError("training.precision: auto chooses by the GPU, and torch sees none", "Leave it out on a CPU.")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    mode = "bf16" if capability >= _BF16_SINCE else "fp16"
    noted = [line for line in files.read_jsonl_log(run.history) if line["event"] == "precision"]
    if noted and noted[0]["mode"] != mode:
        began = f"this run began in {noted[0]['mode']} on {noted[0]['gpu']}"
        remedy = f"Resume it on such a GPU (job.gpu_type), or set training.{mode}: true: that is another run."
        raise UserError(f"training.precision: {began}, and {name} would go on in {mode}", remedy)
    if mode == "fp16" and config.model.dtype == "bfloat16":
        problem = f"model.dtype: bfloat16 weights need bf16, and training.precision: auto is fp16 on {name}"
        raise UserError(problem, "Set model.dtype: float32, which suits both, or ask for an Ampere or newer GPU.")
    if not noted:
        run.note("precision", mode=mode, gpu=name)
    scaled = ", with scaled gradients" if mode == "fp16" else ""
    console.say(f"training.precision: {mode} on {name}{scaled}")
    return mode
