"""Ask a model while it is trained: for the best checkpoint, for early stopping, and whether it has converged.

Every evaluation belongs to a checkpoint that has just been written. Its answers lie in
`eval/<dataset>/<split>/attempt-A-step-N/`, so that a run that is ended in the middle asks only what is missing; a loss
is computed again. The value is a line of metrics.jsonl, which is dropped with the steps around it. Nothing else
remembers which is the best.
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

from ftlib import console, files, preemption
from ftlib.config import Config, Split
from ftlib.config_base import LOSS
from ftlib.config_course import Until
from ftlib.data.prepared import Prepared
from ftlib.errors import UserError
from ftlib.evaluation.answers import require_settings, scores_everywhere
from ftlib.evaluation.asked import Asked
from ftlib.evaluation.subject import Subject
from ftlib.metrics import captions_java
from ftlib.metrics.summary import number
from ftlib.models.adapters import master_weights
from ftlib.models.families import FAMILIES
from ftlib.runs import Run
from ftlib.tasks import TASKS
from ftlib.training import ranks
from ftlib.training.batching import TrainingRows
from ftlib.training.legs import Leg, Place, logged
from ftlib.training.trainer import AnswerTrainer
from ftlib.training.validation import Batch, cut_batches, rows_for_loss, split_loss

_OF_POSITIVE = ("precision", "recall", "F1")


@dataclass(frozen=True)
class Examiner:
    """Asks in the name of one run.

    Attributes:
        base: the folder of the base model.
    """

    config: Config
    run: Run
    prepared: Prepared
    base: Path

    def require(self) -> None:
        """Refuse what could not be asked later.

        Raises:
            UserError: a metric that the task does not have, a bound on its wrong side, a split without rows or with
                rows that no loss is of, settings that nothing can be scored with.
        """
        self.prepared.require_rows(self.config.evaluation.splits)
        if self.config.asks_in_training:
            require_settings(self.config, self.prepared)
        for field, split, metric, until in self._wanted():
            if fault := self._fault(split, metric, until):
                raise UserError(f"{field}: {fault[0]}", fault[1])
            if metric_name(self.config.task, metric) == LOSS:
                self._loss_batches(split)

    @property
    def splits(self) -> list[Split]:
        """The splits that are asked in training."""
        return sorted({split for _, split, _, _ in self._wanted()})

    def _wanted(self) -> list[tuple[str, Split, str, Until | None]]:
        """(the config's field, split, metric, the bound that it is to reach)"""
        best = self.config.checkpoint.best
        wanted: list[tuple[str, Split, str, Until | None]] = []
        if self.config.evaluation.loss:
            wanted.append(("evaluation.loss", "valid", LOSS, None))
        if best:
            wanted.append(("checkpoint.best", "valid", best.metric, None))
        for place, one in enumerate(self.config.rounds):
            if one.until:
                wanted.append((f"rounds.{place}.until", one.until.split, one.until.metric, one.until))
        return wanted

    def _fault(self, split: Split, metric: str, until: Until | None) -> tuple[str, str] | None:
        known = (*TASKS[self.config.task].columns, LOSS)
        name = metric_name(self.config.task, metric)
        if name is None:
            return f"task {self.config.task} has no metric {metric!r}", f"It has {', '.join(known)}."
        if self.config.task == "classify" and name in _OF_POSITIVE and self.config.evaluation.positive is None:
            return f"{name} is of one answer against the others", "Name it in evaluation.positive."
        if lacking := captions_java.missing(name):
            return f"{name} cannot be computed here: {lacking}", "Install it, or take another metric, such as CIDEr-D."
        if not len(self.prepared.rows(split)):
            return f"there are no rows in {split}", "See data.split."
        if until and (until.at_least is not None) != self._higher_is_better(name):
            if until.at_most is None:
                return f"of {name} lower is better", "Set at_most instead of at_least."
            return f"of {name} higher is better", "Set at_least instead of at_most."
        return None

    def _higher_is_better(self, metric: str) -> bool:
        return TASKS[self.config.task].higher_is_better(metric)

    def round_over(self, trainer: AnswerTrainer, place: Place, last: bool) -> bool:
        """Ask valid, or compute its loss, if that is due at a checkpoint; whether patience has come to its end.

        Args:
            last: whether it is the round's last step.
        """
        best = self.config.checkpoint.best
        due = best is not None and (last or (place.step - place.leg.offset) % best.every == 0)
        name = metric_name(self.config.task, best.metric) if best else None
        if self.config.evaluation.loss and name != LOSS:  # else by `every`, whatever else checkpoints are written for
            self.value(trainer, place, "valid", LOSS)
        if best is None or not due:
            return False
        self.value(trainer, place, "valid", best.metric)
        return ranks.share(best.patience is not None and console.speaks() and self._in_vain(place.leg) >= best.patience)

    def value(self, trainer: AnswerTrainer, place: Place, split: Split, metric: str) -> float | None:
        """A metric of the model at a checkpoint, asked unless that has been done; None where it is undefined.

        Raises:
            UserError: the metric cannot be computed here.
            Preempted: a signal came; what has been answered is kept.
        """
        name = metric_name(self.config.task, metric) or metric
        about = {"step": place.step, "attempt": place.leg.attempt, "split": split, "metric": name}
        lines = logged(self.run, place.leg.attempt)
        line = next((line for line in lines if all(line.get(key) == value for key, value in about.items())), None)
        line = ranks.share(line)  # a slower rank may read what the first has just written, or read late on NFS
        if line is None:
            started = time.monotonic()
            found, told = self._loss(trainer, split) if name == LOSS else self._score(trainer, place, split, name)
            line = {**about, "round": place.leg.round, **found}
            if console.speaks():
                files.append_jsonl(self.run.metrics, {**line, "seconds": time.monotonic() - started})
            console.say(f"step {place.step}: {name} on {split} {told}")
        value: float | None = line["value"]
        return value

    def best(self, attempt: int) -> dict[str, Any] | None:
        """The line of metrics.jsonl about the best checkpoint so far (the first of equals), if one is wanted."""
        lines = self._asked_valid(attempt)
        return max(lines, key=self._merit) if lines else None

    def _in_vain(self, leg: Leg) -> int:
        """Evaluations of this round since the best one."""
        lines = self._asked_valid(leg.attempt)
        place = lines.index(max(lines, key=self._merit))
        return sum(line["round"] == leg.round for line in lines[place + 1 :])

    def _merit(self, line: dict[str, Any]) -> float:
        """Undefined values come last."""
        if line["value"] is None:
            return float("-inf")
        return float(line["value"]) * (1 if self._higher_is_better(line["metric"]) else -1)

    def _asked_valid(self, attempt: int) -> list[dict[str, Any]]:
        best = self.config.checkpoint.best
        if best is None:
            return []
        about = ("valid", metric_name(self.config.task, best.metric))
        return [line for line in logged(self.run, attempt) if (line.get("split"), line.get("metric")) == about]

    def _loss(self, trainer: AnswerTrainer, split: Split) -> tuple[dict[str, Any], str]:
        """What its line says, and the same in words."""
        rows, batches = self._loss_batches(split)
        model = trainer.model
        with undisturbed(model):
            model.eval()
            found = split_loss(model, rows, batches, self.config, trainer.accelerator.autocast(), f"loss on {split}")
        return found, f"{number(found['value'], 'fraction')}, perplexity {number(found['perplexity'], 'fraction')}"

    def _loss_batches(self, split: Split) -> tuple[TrainingRows, list[Batch]]:
        """The same at every checkpoint."""
        if split not in self._losses:
            inputs = FAMILIES[self.config.model.family].load_inputs(self.base, self.config)
            rows = rows_for_loss(self.config, self.prepared, split, inputs)
            self._losses[split] = rows, cut_batches(rows, self.config.micro_batch)
        return self._losses[split]

    @functools.cached_property
    def _losses(self) -> dict[Split, tuple[TrainingRows, list[Batch]]]:
        return {}

    def _score(self, trainer: AnswerTrainer, place: Place, split: Split, name: str) -> tuple[dict[str, Any], str]:
        """What its line says, and the same in words."""
        found = self._scores(trainer.model, place, split)
        if name not in found["metrics"]:
            raise UserError(f"{name} was not computed on {split}", "\n".join(found["remarks"]))
        value = found["metrics"][name]["value"]
        return {"value": value}, number(value, found["unit"])

    def _scores(self, model: torch.nn.Module, place: Place, split: Split) -> dict[str, Any]:
        attempt, step = place.leg.attempt, place.step
        generating = {"decode": "generate", "min_precision": None}
        evaluation = self.config.evaluation.model_copy(update=generating)
        config = self.config.model_copy(update={"evaluation": evaluation})
        subject = Subject(f"attempt {attempt}, step {step}", self.base, config, place.checkpoint, loaded=model)
        folder = self.run.evaluation(config.data.source, split, f"attempt-{attempt}-step-{step}")
        with undisturbed(model), rounded(model, config), preemption.unwinding():
            return scores_everywhere(Asked(subject, config, self.prepared), split, folder)


def metric_name(task: str, name: str) -> str | None:
    """A metric as its task spells it, for `f1` or `macro_f1`; None if there is none."""
    plain = {known.lower(): known for known in (*TASKS[task].columns, LOSS)}
    return plain.get(name.lower().replace("_", " "))


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model may be asked; afterwards it trains on as if nothing had been.

    Random states, its mode, and the mixed precision that accelerate has put around its `forward`: inside it answers in
    its own precision, as it does when it is evaluated after training.
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
def rounded(model: torch.nn.Module, config: Config) -> Iterator[None]:
    """Inside, weights that train in float32 among 16-bit ones have the others' type, as when they are loaded later."""
    dtype = getattr(torch, config.model.dtype)
    exact = {parameter: parameter.data for parameter in master_weights(model, config.adapter)}
    for parameter, data in exact.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data
