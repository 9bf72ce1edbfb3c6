"""A run's numbers for TensorBoard and Weights & Biases, out of the same files as the report; written anew each time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ftlib import files
from ftlib.config_base import LOSS
from ftlib.errors import UserError
from ftlib.reporting.collect import BEFORE, RunRecord

CURVES = ("loss", "learning_rate", "grad_norm", "epoch", "seconds", "memory_gib")


def write_tensorboard(record: RunRecord) -> Path:
    """Event files in `<run>/tensorboard/`; `tensorboard --logdir <runs>` shows every run that has them.

    Raises:
        UserError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "event files need tensorboardX, which is not installed", "pip install 'ftlib[trackers]'"
        ) from None
    folder = record.folder / "tensorboard"
    with files.publish_folder(folder) as temporary:
        writer = SummaryWriter(str(temporary))
        for name in CURVES:
            for step, value in record.curve(name):
                writer.add_scalar(f"train/{name}", value, int(step))
        for name, step, value in (*_asked(record), *_scores(record)):
            writer.add_scalar(name, value, step)
        writer.add_text("config", f"```yaml\n{record.config_text}\n```")
        writer.close()
    return folder


def write_wandb(record: RunRecord, project: str) -> Path:
    """An offline run in `<run>/wandb/`; nothing leaves this machine before `wandb sync` is told to send it.

    Args:
        project: its name at Weights & Biases.

    Returns:
        What to give to `wandb sync`.

    Raises:
        UserError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed", "pip install 'ftlib[trackers]'") from None
    shutil.rmtree(record.folder / "wandb", ignore_errors=True)
    quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, console="off", silent=True)
    run = wandb.init(
        mode="offline",
        project=project,
        id=record.identity,
        name=record.handle,
        dir=record.folder,
        config=record.config.model_dump(),
        settings=quiet,
    )
    by_step: dict[int, dict[str, float]] = {}
    for name in CURVES:
        for at, value in record.curve(name):
            by_step.setdefault(int(at), {})[f"train/{name}"] = value
    for name, step, value in _asked(record):
        by_step.setdefault(step, {})[name] = value
    for step in sorted(by_step):
        run.log(by_step[step], step=step)
    run.summary.update({name: value for name, _, value in _scores(record)})
    run.finish()
    wandb.teardown()  # only then all of it is in the file
    return Path(run.dir).parent


def _asked(record: RunRecord) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of what was asked and of losses that were computed in training, in the last attempt."""
    last = max((line["attempt"] for line in record.metrics if "loss" in line), default=0)
    for line in record.metrics:
        if "split" not in line or line["attempt"] != last:
            continue
        values = {line["metric"]: line["value"]}
        if line["metric"] == LOSS:
            values["perplexity"] = line["perplexity"]
            values |= {f"{LOSS}/{part}": found["value"] for part, found in line.get("parts", {}).items()}
        for name, value in values.items():
            if value is not None:
                yield f"{line['split']}/{name}", line["step"], value


def _scores(record: RunRecord) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of every metric: before training at step 0, after it at the last."""
    last = int((record.done or {}).get("step", 0))
    for split in record.splits:
        for when, evaluation in split.by_when.items():
            for name, found in evaluation.scores["metrics"].items():
                if found["value"] is not None:
                    place = f"{split.dataset}/{split.split}/{when}/{name}"
                    yield place, 0 if when == BEFORE else last, found["value"]
