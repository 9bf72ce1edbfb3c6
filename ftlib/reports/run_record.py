"""Read a run folder, finished or not, into one record, without loading a model."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlib.config import privacy, yaml12
from ftlib.config.loader import load_experiment
from ftlib.config.npz_checkpoints import describe_conversion
from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import MERGE_RECORD, is_local_path
from ftlib.metrics.comparability import (
    SETTINGS_PREFIX,
    describe_settings,
    differing_settings,
    evaluation_fingerprint,
)
from ftlib.metrics.formatting import unit_of
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
        differs: the answer settings that are not those of the run's config: name → value; empty if all are.
    """

    when: str
    scores: dict[str, Any]
    folder: Path
    differs: dict[str, Any] = field(default_factory=dict)

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
    def unit(self) -> str:
        """The main metric's unit."""
        return unit_of(self.scores, self.scores["metric"])

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
    """The evaluations of a split of a dataset with the same settings: before training, after training, or both.

    Attributes:
        change: comparison.json, the paired test of before against after; None if it is of older evaluations.
        settings: the settings that are not those of the run's config, as text; "" if all are.
    """

    dataset: str
    split: str
    by_when: dict[str, EvaluationResult]
    change: dict[str, Any] | None = None
    settings: str = ""

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
        splits: evaluated splits, with the config's settings; the run's own dataset and the test split come first.
        other_splits: evaluations with other settings, in the same order.
        damaged: folders of evaluations whose files are incomplete or changed.
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
    other_splits: list[SplitRecord] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
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

    @property
    def damaged_result(self) -> Path | None:
        """A damaged evaluation after training on the run's own dataset that no other score may stand in for."""
        own = [folder for folder in self.damaged if folder.parts[-3] == self.config.data.source]
        return next((folder for folder in own if folder.name == AFTER), None)

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
    splits = _read_splits(run.folder / "eval", experiment.config)
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
        splits=[split for split in splits if not split.settings],
        other_splits=[split for split in splits if split.settings],
        damaged=sorted(_damaged(run.folder / "eval")),
        images=images and config.privacy.images,
        text=text,
    )


def _optional_json(path: Path) -> Any:
    return files.read_json(path) if path.exists() else None


def _read_splits(root: Path, config: Config) -> list[SplitRecord]:
    """Read all evaluations of a run; those with the config's settings come first in each split."""
    splits = [split for folder in root.glob("*/*") for split in _read_split(folder, config)]
    return sorted(splits, key=lambda split: (_order(split, config.data.source), split.settings))


def _read_split(folder: Path, config: Config) -> Iterator[SplitRecord]:
    """Yield the evaluations of a split by their settings; incomplete ones are ignored."""
    found: dict[str, dict[str, EvaluationResult]] = {}
    for place in (folder, *sorted(folder.glob(f"{SETTINGS_PREFIX}*"))):
        for when in (BEFORE, AFTER):
            if _is_usable(place / when):
                scores = files.read_json(place / when / "scores.json")
                differs = differing_settings(scores["settings"], config.evaluation)
                if not config.privacy.text:
                    scores, differs = privacy.scores_without_texts(scores), _without_labels(differs)
                one = EvaluationResult(when, scores, place / when, differs)
                found.setdefault(describe_settings(differs), {}).setdefault(when, one)
    for settings, by_when in found.items():
        ordered = {when: by_when[when] for when in (BEFORE, AFTER) if when in by_when}
        yield SplitRecord(folder.parent.name, folder.name, ordered, _read_change(ordered), settings)


def _without_labels(differs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: privacy.hidden_text(value) if name == "positive" and value else value for name, value in differs.items()
    }


def _read_change(by_when: dict[str, EvaluationResult]) -> dict[str, Any] | None:
    """Return comparison.json, if it compares these two evaluations."""
    if len(by_when) < 2:
        return None
    change: dict[str, Any] | None = _optional_json(by_when[AFTER].folder.with_name("comparison.json"))
    own = [evaluation_fingerprint(files.read_json(one.folder / "scores.json")) for one in by_when.values()]
    return change if change and change.get("of") == own else None


def _damaged(root: Path) -> Iterator[Path]:
    """Yield folders of evaluations that were finished once, but are not what was written."""
    for place in (*root.glob("*/*"), *root.glob(f"*/*/{SETTINGS_PREFIX}*")):
        folders = [place / when for when in (BEFORE, AFTER)]
        yield from (folder for folder in folders if folder.is_dir() and not _is_usable(folder))


def _is_usable(folder: Path) -> bool:
    try:
        return files.is_complete(folder) and bool(files.read_json(folder / "scores.json"))
    except UserError:
        return False


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
