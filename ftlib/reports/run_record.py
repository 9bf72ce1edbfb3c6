"""Read a run folder, finished or not, into one record, without loading a model."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config import privacy, yaml12
from ftlib.config.loader import load_experiment
from ftlib.config.npz_checkpoints import describe_conversion
from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.hub.cache import MERGE_RECORD, is_local_path
from ftlib.metrics.comparability import evaluation_fingerprint
from ftlib.runs.run import Run
from ftlib.runs.usage import Usage, usage
from ftlib.slurm.status import RunStatus

BEFORE, AFTER = "before", "after"
_SPLITS = ("test", "valid", "train")


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation of one model on a split.

    Attributes:
        when: before or after training.
        scores: content of scores.json.
        folder: folder of the predictions.
    """

    when: str
    scores: dict[str, Any]
    folder: Path

    @property
    def value(self) -> float | None:
        """The main metric; None if it is undefined."""
        value = self.scores["value"]
        return None if value is None else float(value)

    @property
    def higher_is_better(self) -> bool:
        """Whether higher is better, for the main metric and the rows' scores; True for old evaluations without it."""
        return bool(self.scores.get("higher_is_better", True))

    @property
    def rows(self) -> str:
        """The fingerprint of the evaluated rows."""
        return str(self.scores["settings"]["fingerprint"])

    @functools.cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """Return the rows of predictions.jsonl."""
        return jsonl.read_jsonl_log(self.folder / "predictions.jsonl")


@dataclass(frozen=True)
class SplitRecord:
    """The evaluations of a split of a dataset: before training, after training, or both.

    Attributes:
        change: comparison.json, the paired test of before against after; None if it is of older evaluations.
    """

    dataset: str
    split: str
    by_when: dict[str, EvaluationResult]
    change: dict[str, Any] | None = None

    @property
    def before(self) -> EvaluationResult | None:
        return self.by_when.get(BEFORE)

    @property
    def after(self) -> EvaluationResult | None:
        return self.by_when.get(AFTER)

    @property
    def latest(self) -> EvaluationResult:
        """The evaluation after training if there is one, else before."""
        return self.after or self.by_when[BEFORE]


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows.

    Attributes:
        folder: the run folder.
        status: the run's status.
        config_text: config.yaml.
        recipe: the run's recipe, see `identity.RECIPES`.
        done: content of the DONE marker; None while the run is not finished.
        data: data.json; None before training has started.
        metrics, history: the rows of metrics.jsonl and history.jsonl.
        environments: environment.json; one entry for each start.
        usage: GPU-hours and goodput, as `ftlib status --usage` counts them without accounting.
        splits: evaluated splits; the run's own dataset and the test split come first.
        images, text: whether images and texts of the data may be shown. Without text, `config` has no prompts, and
            `splits` have no metrics of single labels.
    """

    folder: Path
    status: RunStatus
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
    images: bool = True
    text: bool = True

    @property
    def name(self) -> str:
        """The run's name in commands."""
        return self.status.run

    @property
    def evaluated_only(self) -> bool:
        """Whether only the base model (such as a merged one) was evaluated and no training was started."""
        return bool(self.splits) and not self.starts and self.status.state in ("not started", "evaluating")

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Return the events of training starts."""
        return [event for event in self.history if event["event"] == "start"]

    @property
    def divergences(self) -> list[dict[str, Any]]:
        """Return the events of diverged attempts."""
        return [event for event in self.history if event["event"] == "diverged"]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of the last attempt, for steps with a finite value."""
        steps = [line for line in self.metrics if "loss" in line]
        last = steps[-1]["attempt"] if steps else 0
        pairs = [(line["step"], line.get(key)) for line in steps if line["attempt"] == last]
        return [(float(step), float(value)) for step, value in pairs if value is not None and math.isfinite(value)]


def read_run_record(run: Run, site: Site, status: RunStatus, images: bool = True) -> RunRecord:
    """Read a run folder.

    Args:
        status: of this run, from `status.run_statuses`.
        images: whether images may be shown, if the config also allows it.

        Raises:
            UserError: its config is invalid, or a file in it is damaged.
    """
    experiment = load_experiment(run.config_file, [], site)
    config, text = experiment.config, experiment.config.privacy.text
    config_text = run.config_file.read_text(encoding="utf-8")
    if not text:
        config = Config.model_validate(privacy.without_texts(config.model_dump(by_alias=True)))
        config_text = yaml12.dump(privacy.without_texts(yaml12.load(config_text, str(run.config_file))[0]))
    return RunRecord(
        folder=run.folder,
        status=status,
        config=config,
        config_text=config_text,
        identity=experiment.identity,
        recipe=experiment.names[0].recipe,
        done=_optional_json(run.done_marker),
        data=_optional_json(run.data),
        metrics=jsonl.read_jsonl_log(run.metrics),
        history=jsonl.read_jsonl_log(run.history),
        environments=_optional_json(run.environment) or [],
        usage=usage(run),
        splits=_read_splits(run.folder / "eval", config.data.source, text),
        images=images and config.privacy.images,
        text=text,
    )


def _optional_json(path: Path) -> Any:
    return files.read_json(path) if path.exists() else None


def _read_splits(root: Path, own: str, text: bool) -> list[SplitRecord]:
    splits = [_read_split(folder, text) for folder in root.glob("*/*")]
    return sorted((split for split in splits if split.by_when), key=lambda split: _order(split, own))


def _read_split(folder: Path, text: bool) -> SplitRecord:
    """Read the evaluations of a split; incomplete ones are ignored."""
    whole = [when for when in (BEFORE, AFTER) if files.is_complete(folder / when)]
    scores = {when: files.read_json(folder / when / "scores.json") for when in whole}
    change = _optional_json(folder / "comparison.json") if len(whole) == 2 else None
    if change and change.get("of") != [evaluation_fingerprint(one) for one in scores.values()]:
        change = None
    shown = {when: one if text else privacy.scores_without_texts(one) for when, one in scores.items()}
    by_when = {when: EvaluationResult(when, one, folder / when) for when, one in shown.items()}
    return SplitRecord(folder.parent.name, folder.name, by_when, change)


def _order(split: SplitRecord, own: str) -> tuple[bool, str, int, str]:
    place = _SPLITS.index(split.split) if split.split in _SPLITS else len(_SPLITS)
    return (split.dataset != own, split.dataset, place, split.split)


# A run's state and interruptions as text.

_ACTIVE = ("queued", "running", "evaluating")
_STATE_WORDS = {"preempted": "preempted", "diverged": "diverged"}


def describe_state(record: RunRecord) -> tuple[str, str]:
    """Return the run's state as in `ftlib status`, and details."""
    word, reason = record.status.state, record.status.reason
    go_on = f"ftlib train {record.folder / 'config.yaml'}"
    if record.done:
        parts = [*_finish(record.done, record.divergences), reason]
    elif word == "not started":
        parts = [reason, f"train it with: {go_on}"]
    elif word == "diverged":
        parts = [reason, "no result was written"]
    else:
        step = record.metrics[-1]["step"] if record.metrics else None
        logged = "no step logged yet" if step is None else f"last logged step {step:,}"
        parts = [reason, logged, *([] if word in _ACTIVE else [f"resume with: {go_on}"])]
    return word, "; ".join(filter(None, parts))


def _finish(done: dict[str, Any], failed: list[dict[str, Any]]) -> list[str]:
    parts = [f"{done['step']:,} steps"]
    if best := done.get("best"):
        value = "undefined" if best["value"] is None else f"{best['value']:.4g}"
        parts.append(f"the result is from step {best['step']:,}, {best['metric']} on valid {value}")
    if failed:
        parts.append(f"attempt {len(failed)}: training diverged {_times(len(failed))} before")
    return parts


def interruptions(*records: RunRecord) -> str:
    """Return counts of restarts, preemptions and divergences as text; empty for runs without interruptions."""
    events = [event["event"] for record in records for event in record.history]
    counts = Counter(_STATE_WORDS[event] for event in events if event in _STATE_WORDS)
    told = [f"{word} {_times(number)}" for word, number in sorted(counts.items())]
    resumed = sum(max(0, len(record.starts) - 1) for record in records)
    return ", ".join([f"resumed {_times(resumed)}", *told] if resumed > 0 else told)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def origin_of(base: str) -> str:
    """Return the origin of a config's base model: a merge, a conversion, or an original model."""
    if merge := merge_record(base):
        models = [f"{one['model']} (weight {one['weight']:g})" for one in merge["recipe"]["models"]]
        return f"{merge['recipe']['method']} of {', '.join(models)}: {merge['formula']}"
    if is_local_path(base) and not Path(base).expanduser().is_dir():
        return "its folder does not exist"
    return describe_conversion(base) or "base model"


def merge_record(base: str) -> dict[str, Any] | None:
    path = Path(base).expanduser() / MERGE_RECORD
    return files.read_json(path) if is_local_path(base) and path.is_file() else None
