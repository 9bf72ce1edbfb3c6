"""Ask a model while it is trained: for the best checkpoint, for early stopping, and whether it has converged.

Every evaluation belongs to a checkpoint that has just been written. Its answers lie in
`eval/<dataset>/<split>/attempt-A-step-N/`, so that a run that is ended in the middle asks only what is missing; its
value is a line of metrics.jsonl, which is dropped with the steps around it. Nothing else remembers which is the best.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlib import console, files, preemption
from ftlib.config import Attention, Config, Split
from ftlib.data.prepared import Prepared
from ftlib.errors import UserError
from ftlib.evaluation.answers import require_settings, scores_everywhere
from ftlib.evaluation.asked import Asked
from ftlib.evaluation.subject import Subject
from ftlib.metrics import captions_java
from ftlib.metrics.summary import number
from ftlib.runs import Run
from ftlib.tasks import TASKS
from ftlib.training import ranks
from ftlib.training.legs import Leg, Place, logged

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
            UserError: a metric that the task does not have, a split without rows, settings that nothing can be scored
                with.
        """
        self.prepared.require_rows(self.config.evaluation.splits)
        if self._wanted():
            require_settings(self.config, self.prepared)
        for field, split, metric in self._wanted():
            if fault := self._fault(split, metric):
                raise UserError(f"{field}: {fault[0]}", fault[1])

    @property
    def splits(self) -> list[str]:
        """The splits that are asked in training."""
        return sorted({split for _, split, _ in self._wanted()})

    def _wanted(self) -> list[tuple[str, str, str]]:
        """(the config's field, split, metric)"""
        best = self.config.checkpoint.best
        wanted: list[tuple[str, str, str]] = [("checkpoint.best", "valid", best.metric)] if best else []
        for place, one in enumerate(self.config.rounds):
            wanted += [(f"rounds.{place}.until", one.until.split, one.until.metric)] if one.until else []
        return wanted

    def _fault(self, split: str, metric: str) -> tuple[str, str] | None:
        known = TASKS[self.config.task].columns
        name = metric_name(self.config.task, metric)
        if name is None:
            return f"task {self.config.task} has no metric {metric!r}", f"It has {', '.join(known)}."
        if self.config.task == "classify" and name in _OF_POSITIVE and self.config.evaluation.positive is None:
            return f"{name} is of one answer against the others", "Name it in evaluation.positive."
        if lacking := captions_java.missing(name):
            return f"{name} cannot be computed here: {lacking}", "Install it, or take another metric, such as CIDEr-D."
        if not len(self.prepared.rows(split)):
            return f"there are no rows in {split}", "See data.split."
        return None

    def round_over(self, model: torch.nn.Module, place: Place, last: bool) -> bool:
        """Ask valid if that is due at a checkpoint; whether patience has come to its end.

        Args:
            last: whether it is the round's last step.
        """
        best = self.config.checkpoint.best
        if best is None or not (last or (place.step - place.leg.offset) % best.every == 0):
            return False
        self.value(model, place, "valid", best.metric)
        return ranks.share(best.patience is not None and console.speaks() and self._in_vain(place.leg) >= best.patience)

    def value(self, model: torch.nn.Module, place: Place, split: Split, metric: str) -> float:
        """A metric of the model at a checkpoint, asked unless that has been done; undefined counts as -inf.

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
            found = self._scores(model, place, split)
            if name not in found["metrics"]:
                raise UserError(f"{name} was not computed on {split}", "\n".join(found["remarks"]))
            line = {**about, "round": place.leg.round, "value": found["metrics"][name]["value"]}
            if console.speaks():
                files.append_jsonl(self.run.metrics, {**line, "seconds": time.monotonic() - started})
            console.say(f"step {place.step}: {name} on {split} {number(line['value'], found['unit'])}")
        return _order(line)

    def best(self, attempt: int) -> dict[str, Any] | None:
        """The line of metrics.jsonl about the best checkpoint so far (the first of equals), if one is wanted."""
        lines = self._asked_valid(attempt)
        return max(lines, key=_order) if lines else None

    def _in_vain(self, leg: Leg) -> int:
        """Evaluations of this round since the best one."""
        lines = self._asked_valid(leg.attempt)
        place = lines.index(max(lines, key=_order))
        return sum(line["round"] == leg.round for line in lines[place + 1 :])

    def _asked_valid(self, attempt: int) -> list[dict[str, Any]]:
        best = self.config.checkpoint.best
        if best is None:
            return []
        about = ("valid", metric_name(self.config.task, best.metric))
        return [line for line in logged(self.run, attempt) if (line.get("split"), line.get("metric")) == about]

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
    plain = {known.lower(): known for known in TASKS[task].columns}
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
    exact = {}
    if isinstance(config.adapter, Attention):
        exact = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    for parameter, data in exact.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data


def _order(line: dict[str, Any]) -> float:
    return float("-inf") if line["value"] is None else float(line["value"])
