"""`batch.auto`: the micro-batch that a run takes on the GPU that it has got."""

from __future__ import annotations

from dataclasses import replace

import torch

from ftlib import console, files
from ftlib.config_file import Experiment
from ftlib.errors import UserError
from ftlib.hub import find_model
from ftlib.memory.cuts import choose_cut, gib, gpu_bytes, longest_rows
from ftlib.memory.need import build_shapes
from ftlib.runs import Run
from ftlib.site import Site

SHARE = 0.94
"""Of the GPU's memory that a plan may fill: the allocator's own gaps take the rest."""


def sized_to_gpu(experiment: Experiment, run: Run, site: Site) -> Experiment:
    """With `batch.auto`, the experiment with the largest micro-batch that fits this GPU, noted in the run's history.

    What a GPU of this name has proved too small for is not tried again. Without a GPU, or without `batch.auto`, the
    experiment as it is.

    Raises:
        UserError: not even a single row fits, or there are several GPUs.
    """
    config, capacity = experiment.config, gpu_bytes()
    if config.batch.auto and console.ranks()[1] > 1:
        raise UserError("batch.auto is for one GPU, and this job has several tasks", "Set it to false.")
    if not config.batch.auto or capacity is None:
        return experiment
    folder = find_model(config.model, site)
    model = build_shapes(folder, config)
    rows, _ = longest_rows(config, site, folder, model, run)
    cut = choose_cut(model, config, rows, int(SHARE * capacity), _proved(run))
    chosen = cut.applied(config)
    accumulation = chosen.training["gradient_accumulation_steps"]
    facts = {"micro_batch": cut.micro_batch, "accumulation": accumulation, "checkpointing": cut.checkpointing}
    run.note("micro-batch", **facts, predicted=cut.need.total, gpu=gpu_name())
    how = "with" if cut.checkpointing else "without"
    console.say(
        f"batch.auto: micro-batches of {cut.micro_batch}, {accumulation} a step, {how} gradient checkpointing: "
        f"{gib(cut.need.total)} of {gib(capacity)}"
    )
    return replace(experiment, config=chosen)


def note_halved(run: Run, size: int) -> None:
    """Tell user and history that memory ran out and how many rows are computed at once from now on."""
    run.note("out of memory", micro_batch=size, gpu=gpu_name())
    console.say(f"out of memory; going on from the same step with {size} rows at once")


def gpu_name() -> str | None:
    """The name of this process's GPU; None: there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _proved(run: Run) -> int | None:
    """The largest micro-batch after memory ran out on a GPU of this name; None: it never did."""
    lines = files.read_jsonl_log(run.history)
    sizes = [line["micro_batch"] for line in lines if line["event"] == "out of memory" and line["gpu"] == gpu_name()]
    return min(sizes, default=None)
