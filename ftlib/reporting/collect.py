"""Read a run folder, finished or not, into one record; no model is loaded."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import files, history
from ftlib.config import Config
from ftlib.config_file import load_experiment
from ftlib.history import Usage
from ftlib.metrics.likeness import settings_hash
from ftlib.reporting.standing import Standing
from ftlib.runs import Run
from ftlib.site import Site

BEFORE, AFTER = "before", "after"
_SPLITS = ("test", "valid", "train")


@dataclass(frozen=True)
class Evaluation:
    """One model's answers on a split.

    Attributes:
        when: before or after training.
        scores: scores.json.
        folder: where the answers lie.
    """

    when: str
    scores: dict[str, Any]
    folder: Path

    @property
    def value(self) -> float | None:
        """The main metric; None where it is undefined."""
        value = self.scores["value"]
        return None if value is None else float(value)

    @property
    def higher_is_better(self) -> bool:
        """The direction of the main metric, and of the rows' scores; evaluations that do not tell it have no errors."""
        return bool(self.scores.get("higher_is_better", True))

    @property
    def rows(self) -> str:
        """The fingerprint of the rows that were asked."""
        return str(self.scores["settings"]["fingerprint"])

    @functools.cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """The rows of predictions.jsonl."""
        return files.read_jsonl_log(self.folder / "predictions.jsonl")


@dataclass(frozen=True)
class SplitRecord:
    """What is known of one split of one dataset; at least one of before and after is there.

    Attributes:
        change: comparison.json, the paired test of before against after; None if it is of earlier evaluations.
    """

    dataset: str
    split: str
    by_when: dict[str, Evaluation]
    change: dict[str, Any] | None = None

    @property
    def before(self) -> Evaluation | None:
        return self.by_when.get(BEFORE)

    @property
    def after(self) -> Evaluation | None:
        return self.by_when.get(AFTER)

    @property
    def latest(self) -> Evaluation:
        """After training if that was asked, else before."""
        return self.after or self.by_when[BEFORE]


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report tells.

    Attributes:
        folder: the run folder.
        standing: how far the run is.
        config_text: config.yaml as it is.
        recipe: that it was made with, see `identity.RECIPES`.
        done: the DONE marker's content; None while the run is not finished.
        data: data.json; None before training has begun.
        metrics, history: the rows of metrics.jsonl and history.jsonl.
        environments: environment.json; one entry for each start.
        usage: GPU-hours, as `ftlib status --usage` counts them.
        splits: evaluated ones, the run's own dataset and the test split first.
    """

    folder: Path
    standing: Standing
    config: Config
    config_text: str
    identity: str
    recipe: int
    done: dict[str, Any] | None
    data: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    history: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    usage: Usage
    splits: list[SplitRecord]

    @property
    def handle(self) -> str:
        """How commands name the run."""
        return self.standing.run

    @property
    def only_asked(self) -> bool:
        """Whether its untrained model was evaluated, such as a merged one, and no training was ever begun."""
        return bool(self.splits) and not self.starts and self.standing.state in ("not started", "evaluating")

    @property
    def starts(self) -> list[dict[str, Any]]:
        """One event for each time that training was started."""
        return [event for event in self.history if event["event"] == "start"]

    @property
    def divergences(self) -> list[dict[str, Any]]:
        """One event for each attempt that diverged."""
        return [event for event in self.history if event["event"] == "diverged"]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) in the last attempt, of the steps whose value is a finite number."""
        steps = [line for line in self.metrics if "loss" in line]
        last = steps[-1]["attempt"] if steps else 0
        pairs = [(line["step"], line.get(key)) for line in steps if line["attempt"] == last]
        return [(float(step), float(value)) for step, value in pairs if value is not None and math.isfinite(value)]


def collect(run: Run, site: Site, standing: Standing) -> RunRecord:
    """Read a run folder.

    Args:
        standing: of this run, from `standing.standings_of`.

    Raises:
        UserError: its config is faulty, or a file in it is damaged.
    """
    experiment = load_experiment(run.config_file, [], site)
    return RunRecord(
        folder=run.folder,
        standing=standing,
        config=experiment.config,
        config_text=run.config_file.read_text(encoding="utf-8"),
        identity=experiment.identity,
        recipe=experiment.names[0].recipe,
        done=_optional_json(run.done),
        data=_optional_json(run.data),
        metrics=files.read_jsonl_log(run.metrics),
        history=files.read_jsonl_log(run.history),
        environments=_optional_json(run.environment) or [],
        usage=history.usage(run),
        splits=_read_splits(run.folder / "eval", experiment.config.data.source),
    )


def _optional_json(path: Path) -> Any:
    return files.read_json(path) if path.exists() else None


def _read_splits(root: Path, own: str) -> list[SplitRecord]:
    splits = [_read_split(folder) for folder in root.glob("*/*")]
    return sorted((split for split in splits if split.by_when), key=lambda split: _order(split, own))


def _read_split(folder: Path) -> SplitRecord:
    """An evaluation that is being written, or was torn, does not count."""
    whole = [when for when in (BEFORE, AFTER) if files.is_complete(folder / when)]
    by_when = {when: _read_evaluation(folder / when) for when in whole}
    change = _optional_json(folder / "comparison.json") if len(whole) == 2 else None
    if change and change.get("of") != [settings_hash(one.scores) for one in by_when.values()]:
        change = None
    return SplitRecord(folder.parent.name, folder.name, by_when, change)


def _read_evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder.name, files.read_json(folder / "scores.json"), folder)


def _order(split: SplitRecord, own: str) -> tuple[bool, str, int, str]:
    place = _SPLITS.index(split.split) if split.split in _SPLITS else len(_SPLITS)
    return (split.dataset != own, split.dataset, place, split.split)
