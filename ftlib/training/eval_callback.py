"""Evaluation during training: the best checkpoint, early stopping, and the convergence check of `rounds`.

Every evaluation belongs to a checkpoint that has just been written. Predictions are stored in
`eval/<dataset>/<split>/attempt-A-step-N/`, so that an interrupted evaluation resumes; a loss is computed again. The
value is a line of metrics.jsonl, which is removed together with the steps after a resume point. The best checkpoint is
derived from these lines; no other state is kept.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlib.config.schema import LOSS, Config, Split, Until
from ftlib.core import jsonl, log, signals
from ftlib.core.paths import Site
from ftlib.data.dataset import PreparedDataset
from ftlib.errors import UserError
from ftlib.evaluation.evaluate import EvaluationRequest, evaluate_on_all_ranks, validate_settings
from ftlib.evaluation.model import EvalModel
from ftlib.metrics import meteor_spice
from ftlib.metrics.formatting import format_value
from ftlib.models import sharding
from ftlib.models.adapters import master_weights
from ftlib.models.lengths import length_cache_path
from ftlib.models.registry import family_of
from ftlib.runs.run import Run
from ftlib.tasks.registry import task_of
from ftlib.training import distributed
from ftlib.training.data import SupervisedDataset
from ftlib.training.resume import ResumePoint, TrainingPhase, logged_metrics
from ftlib.training.trainer import ResumableTrainer
from ftlib.training.validation import LossBatch, loss_dataset, make_batches, split_loss

_OF_POSITIVE = ("precision", "recall", "F1")


@dataclass(frozen=True)
class CheckpointEvaluator:
    """Evaluates the checkpoints of one run.

    Attributes:
        base: the folder of the base model.
    """

    config: Config
    run: Run
    prepared: PreparedDataset
    base: Path
    site: Site

    def validate(self) -> None:
        """Check before training that all evaluations of the config are possible.

        Raises:
            UserError: the task lacks a metric, `until` has the wrong bound for it, a split has no rows or rows without
                a loss, or the evaluation settings are invalid.
        """
        self.prepared.require_rows(self.config.evaluation.splits)
        if self.config.generates_in_training:
            validate_settings(self.config, self.prepared)
        for field, split, metric, until in self._metrics_needed():
            if fault := self._metric_error(split, metric, until):
                raise UserError(f"{field}: {fault[0]}", fault[1])
            if metric_name(self.config, metric) == LOSS:
                self._loss_batches(split)

    @property
    def splits(self) -> list[Split]:
        """Return the splits that are evaluated during training."""
        return sorted({split for _, split, _, _ in self._metrics_needed()})

    def _metrics_needed(self) -> list[tuple[str, Split, str, Until | None]]:
        """Return (config field, split, metric, bound to reach) of each."""
        best = self.config.checkpoint.best
        wanted: list[tuple[str, Split, str, Until | None]] = []
        if self.config.evaluation.loss:
            wanted.append(("evaluation.loss", "valid", LOSS, None))
        if best:
            wanted.append(("checkpoint.best", "valid", best.metric, None))
        for point, one in enumerate(self.config.rounds):
            if one.until:
                wanted.append((f"rounds.{point}.until", one.until.split, one.until.metric, one.until))
        return wanted

    def _metric_error(self, split: Split, metric: str, until: Until | None) -> tuple[str, str] | None:
        known = (*task_of(self.config).columns, LOSS)
        name = metric_name(self.config, metric)
        if name is None:
            return f"task {self.config.task} has no metric {metric!r}", f"It has {', '.join(known)}."
        if self.config.task == "classify" and name in _OF_POSITIVE and self.config.evaluation.positive is None:
            return f"{name} needs a positive class", "Set evaluation.positive."
        if lacking := meteor_spice.find_missing(name):
            return f"{name} cannot be computed here: {lacking}", "Install it, or use another metric, such as CIDEr-D."
        if not len(self.prepared.rows(split)):
            return f"{split} has no rows", "See data.split."
        if until and (until.at_least is not None) != self._higher_is_better(name):
            if until.at_most is None:
                return f"lower {name} is better", "Set at_most instead of at_least."
            return f"higher {name} is better", "Set at_least instead of at_most."
        return None

    def _higher_is_better(self, metric: str) -> bool:
        return task_of(self.config).higher_is_better(metric)

    def should_stop_early(self, trainer: ResumableTrainer, point: ResumePoint, last: bool) -> bool:
        """Evaluate valid at a checkpoint if that is due; return whether patience is exhausted.

        Args:
            last: whether this is the last step of the phase.
        """
        best = self.config.checkpoint.best
        due = best is not None and (last or (point.step - point.phase.offset) % best.every == 0)
        name = metric_name(self.config, best.metric) if best else None
        if self.config.evaluation.loss and name != LOSS:  # else only every `every` steps, below
            self.value(trainer, point, "valid", LOSS)
        if best is None or not due:
            return False
        self.value(trainer, point, "valid", best.metric)
        return distributed.broadcast_object(
            best.patience is not None
            and log.is_main_process()
            and self._evaluations_since_best(point.phase) >= best.patience
        )

    def value(self, trainer: ResumableTrainer, point: ResumePoint, split: Split, metric: str) -> float | None:
        """Return a metric of the model at a checkpoint, evaluating it unless it is logged; None if it is undefined.

        Raises:
            UserError: the metric cannot be computed here.
            Preempted: a signal came; the predictions so far are kept.
        """
        name = metric_name(self.config, metric) or metric
        about = {"step": point.step, "attempt": point.phase.attempt, "split": split, "metric": name}
        lines = logged_metrics(self.run, point.phase.attempt)
        line = next((line for line in lines if all(line.get(key) == value for key, value in about.items())), None)
        line = distributed.broadcast_object(line)  # ranks may see different versions of the file, for example on NFS
        if line is None:
            started = time.monotonic()
            found, told = self._loss(trainer, split) if name == LOSS else self._score(trainer, point, split, name)
            line = {**about, "round": point.phase.round, **found}
            if log.is_main_process():
                jsonl.append_jsonl(self.run.metrics, {**line, "seconds": time.monotonic() - started})
            log.info(f"step {point.step}: {name} on {split} {told}")
        value: float | None = line["value"]
        return value

    def best_checkpoint(self, attempt: int) -> dict[str, Any] | None:
        """Return the line of metrics.jsonl of the best checkpoint (the first of equals); None without one."""
        lines = self._logged_valid(attempt)
        return max(lines, key=self._sort_key) if lines else None

    def _evaluations_since_best(self, phase: TrainingPhase) -> int:
        """Return the number of evaluations in this phase since the best one."""
        lines = self._logged_valid(phase.attempt)
        point = lines.index(max(lines, key=self._sort_key))
        return sum(line["round"] == phase.round for line in lines[point + 1 :])

    def _sort_key(self, line: dict[str, Any]) -> float:
        """Return the key for `max`: undefined values are the lowest."""
        if line["value"] is None:
            return float("-inf")
        return float(line["value"]) * (1 if self._higher_is_better(line["metric"]) else -1)

    def _logged_valid(self, attempt: int) -> list[dict[str, Any]]:
        best = self.config.checkpoint.best
        if best is None:
            return []
        about = ("valid", metric_name(self.config, best.metric))
        return [line for line in logged_metrics(self.run, attempt) if (line.get("split"), line.get("metric")) == about]

    def _loss(self, trainer: ResumableTrainer, split: Split) -> tuple[dict[str, Any], str]:
        """Return the loss for metrics.jsonl, and a message."""
        rows, batches = self._loss_batches(split)
        model = trainer.model
        with preserve_training_state(model), sharding.whole(model):
            model.eval()
            found = split_loss(model, rows, batches, self.config, trainer.accelerator.autocast(), f"loss on {split}")
        return (
            found,
            f"{format_value(found['value'], 'fraction')}, perplexity {format_value(found['perplexity'], 'fraction')}",
        )

    def _loss_batches(self, split: Split) -> tuple[SupervisedDataset, list[LossBatch]]:
        """Return the rows of a split in batches, cached for all checkpoints."""
        if split not in self._losses:
            processor = family_of(self.config.model).load_processor(self.base, self.config)
            cache = length_cache_path(self.prepared, split, self.config, self.base, self.site)
            rows = loss_dataset(self.config, self.prepared, split, processor, cache)
            self._losses[split] = rows, make_batches(rows, self.config.micro_batch_size)
        return self._losses[split]

    @functools.cached_property
    def _losses(self) -> dict[Split, tuple[SupervisedDataset, list[LossBatch]]]:
        return {}

    def _score(
        self, trainer: ResumableTrainer, point: ResumePoint, split: Split, name: str
    ) -> tuple[dict[str, Any], str]:
        """Return the value for metrics.jsonl, and a message."""
        found = self._scores(trainer.model, point, split)
        if name not in found["metrics"]:
            raise UserError(f"{name} was not computed on {split}", "\n".join(found["remarks"]))
        value = found["metrics"][name]["value"]
        return {"value": value}, format_value(value, found["unit"])

    def _scores(self, model: torch.nn.Module, point: ResumePoint, split: Split) -> dict[str, Any]:
        attempt, step = point.phase.attempt, point.step
        generating = {"decode": "generate", "min_precision": None}
        evaluation = self.config.evaluation.model_copy(update=generating)
        config = self.config.model_copy(update={"evaluation": evaluation})
        subject = EvalModel(f"attempt {attempt}, step {step}", self.base, config, point.checkpoint, loaded=model)
        folder = self.run.evaluation_folder(config.data.source, split, f"attempt-{attempt}-step-{step}")
        with (
            preserve_training_state(model),
            sharding.whole(model),
            in_inference_dtype(model, config),
            signals.raise_on_signal(),
        ):
            return evaluate_on_all_ranks(EvaluationRequest(subject, config, self.prepared), split, folder)


def metric_name(config: Config, name: str) -> str | None:
    """Return the task's spelling of a metric such as `f1` or `macro_f1`; None if the task has no such metric."""
    plain = {known.lower(): known for known in (*task_of(config).columns, LOSS)}
    return plain.get(name.lower().replace("_", " "))


@contextlib.contextmanager
def preserve_training_state(model: torch.nn.Module) -> Iterator[None]:
    """Context for evaluation: restores RNG states, training mode and mixed precision afterwards.

    accelerate's mixed precision wrapper of `forward` is removed inside, so that the model computes in its own dtype, as
    in an evaluation after training.
    """
    mixed = model.__dict__.pop("forward", None)
    training, states = model.training, (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.train(training)
        if mixed is not None:
            model.forward = mixed


@contextlib.contextmanager
def in_inference_dtype(model: torch.nn.Module, config: Config) -> Iterator[None]:
    """Context in which float32 master weights have the model's 16-bit dtype, as when the result is loaded."""
    dtype = getattr(torch, config.model.dtype)
    exact = {parameter: parameter.data for parameter in master_weights(model, config.adapter)}
    for parameter, data in exact.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data
