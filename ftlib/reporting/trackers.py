"""A run's numbers for TensorBoard and Weights & Biases, out of the same files as the report; written anew each time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ftlib import files
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
        for name, step, value in _scores(record):
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
    steps = {step for name in CURVES for step, _ in record.curve(name)}
    curves = {name: dict(record.curve(name)) for name in CURVES}
    for step in sorted(steps):
        run.log({f"train/{name}": curve[step] for name, curve in curves.items() if step in curve}, step=int(step))
    run.summary.update({name: value for name, _, value in _scores(record)})
    run.finish()
    wandb.teardown()  # only then all of it is in the file
    return Path(run.dir).parent


def _scores(record: RunRecord) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of every metric: before training at step 0, after it at the last."""
    last = int((record.done or {}).get("step", 0))
    for split in record.splits:
        for when, evaluation in split.by_when.items():
            for name, found in evaluation.scores["metrics"].items():
                if found["value"] is not None:
                    place = f"{split.dataset}/{split.split}/{when}/{name}"
                    yield place, 0 if when == BEFORE else last, found["value"]
