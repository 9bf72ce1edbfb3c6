"""Export a report: Markdown, CSV, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftlib.config.schema import LOSS
from ftlib.core import files
from ftlib.core.log import escape_control_characters
from ftlib.core.redaction import redact, redact_values
from ftlib.errors import UserError
from ftlib.reports.run_record import BEFORE, RunRecord, describe_state, interruptions
from ftlib.reports.run_report import cost, headline, metric_tables
from ftlib.reports.sweep_report import best_sentence, count_states, sweep_tables
from ftlib.reports.sweep_stats import group_runs, trained_groups

# Markdown, and CSV with one line per score.

_SCORE_COLUMNS = ["dataset", "split", "training", "metric", "value", "low", "high", "n", "main", "settings"]


def markdown(records: Sequence[RunRecord]) -> str:
    """Return the report's sentences and tables as Markdown."""
    if len(records) > 1:
        head = [f"# {best_sentence(trained_groups(records))}", count_states(records)]
        parts = [*head, *[table.markdown() for table in sweep_tables(records)]]
    else:
        (record,) = records
        told = "; ".join(text for text in (*describe_state(record), interruptions(record), cost(records)) if text)
        tables = [table.markdown() for table in metric_tables(record)]
        parts = [f"# {record.config.name}: {headline(record)}", told, *tables]
    return "\n\n".join(parts) + "\n"


def score_lines(records: Sequence[RunRecord]) -> str:
    """Return CSV (RFC 4180): a line for every metric of every evaluation, with the keys in which the runs differ.

    Missing values are empty cells; `main` is 1 for the metric that ranks settings; `settings` are
    those of the evaluation that its run's config does not have.
    """
    settings = group_runs(records)
    keys = list(settings[0].values)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["run", "seed", *keys, *_SCORE_COLUMNS])
    for setting in settings:
        for run in setting.runs:
            known = [run.name, run.config.seed, *setting.values.values()]
            rows = ([*known, *cells] for cells in _exports_scores(run))
            writer.writerows(
                [escape_control_characters(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
            )
    return out.getvalue()


def _exports_scores(run: RunRecord) -> Iterator[list[Any]]:
    for split in (*run.splits, *run.other_splits):
        for when, evaluation in split.by_when.items():
            scores = evaluation.scores
            for name, found in scores["metrics"].items():
                low, high = found["interval"] or ("", "")
                value = "" if found["value"] is None else found["value"]
                place = [split.dataset, split.split, when, name]
                main = int(name == scores["metric"] and not split.settings)
                yield [*place, value, low, high, scores["n"], main, split.settings]


# Exports to TensorBoard and Weights & Biases, from the same files as the report; each export replaces the last one.

CURVES = ("loss", "learning_rate", "grad_norm", "epoch", "seconds", "memory_gib")


def write_tensorboard(record: RunRecord) -> Path:
    """Write event files to `<run>/tensorboard/`; `tensorboard --logdir <runs>` shows all runs that have them.

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
    with files.atomic_directory(folder) as temporary:
        writer = SummaryWriter(str(temporary))
        for name in CURVES:
            for step, value in record.curve(name):
                writer.add_scalar(f"train/{name}", value, int(step))
        for name, step, value in (*_evaluations_in_training(record), *_trackers_scores(record)):
            writer.add_scalar(name, value, step)
        writer.add_text("config", f"```yaml\n{redact(record.config_text)}\n```")
        writer.close()
    return folder


def write_wandb(record: RunRecord, project: str) -> Path:
    """Write an offline run to `<run>/wandb/`; nothing is uploaded before `wandb sync`.

    Args:
        project: name of the project at Weights & Biases.

    Returns:
        The folder for `wandb sync`.

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
        name=record.name,
        dir=record.folder,
        config=redact_values(record.config.model_dump()),
        settings=quiet,
    )
    by_step: dict[int, dict[str, float]] = {}
    for name in CURVES:
        for at, value in record.curve(name):
            by_step.setdefault(int(at), {})[f"train/{name}"] = value
    for name, step, value in _evaluations_in_training(record):
        by_step.setdefault(step, {})[name] = value
    for step in sorted(by_step):
        run.log(by_step[step], step=step)
    run.summary.update({name: value for name, _, value in _trackers_scores(record)})
    run.finish()
    wandb.teardown()  # flushes the file
    return Path(run.dir).parent


def _evaluations_in_training(record: RunRecord) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step, value) of evaluations and losses during training, in the last attempt."""
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


def _trackers_scores(record: RunRecord) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step, value) of every metric: before training at step 0, after training at the last step."""
    last = int((record.done or {}).get("step", 0))
    for split in record.splits:
        for when, evaluation in split.by_when.items():
            for name, found in evaluation.scores["metrics"].items():
                if found["value"] is not None:
                    place = f"{split.dataset}/{split.split}/{when}/{name}"
                    yield place, 0 if when == BEFORE else last, found["value"]
