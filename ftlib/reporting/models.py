"""Models side by side on everything that was asked: the base, the runs trained from it, and merges of those.

A merged model is asked by `ftlib evaluate CONFIG model.base=MERGED --before`; the folder of such a model holds
`merge.json`, which tells how it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftlib import files
from ftlib.config import Config, Model
from ftlib.hub import MERGE_RECORD, looks_local
from ftlib.metrics.likeness import how_asked
from ftlib.reporting.collect import Evaluation, RunRecord
from ftlib.reporting.leaderboard import values_text
from ftlib.reporting.settings import Setting, words
from ftlib.reporting.tables import Table

_BASES, _TRAINED, _MERGES = range(3)
_LOADED = {
    "revision": "revision ",
    "dtype": "",
    "quantization": "",
    "final_softcap": "final_softcap ",
    "max_length": "max_length ",
}
"""The settings of a model that its answers depend on → what is said before their values."""


class _Model(NamedTuple):
    """A row: which group it stands in, its name, and where it comes from."""

    group: int
    name: str
    origin: str


class _Place(NamedTuple):
    """A column: the same rows of a dataset (by their fingerprint), asked in the same way for the same metric."""

    split: str
    metric: str
    asked: tuple[tuple[str, str], ...]


def models_table(settings: Sequence[Setting], asked: Sequence[RunRecord]) -> Table | None:
    """A row for each base, setting and merge, a column for each dataset, split and metric; None if all were trained.

    Args:
        settings: of the trained runs.
        asked: runs whose models were only asked.
    """
    if not asked:
        return None
    scores: dict[_Model, dict[_Place, list[float]]] = {}
    labels: dict[_Place, str] = {}
    for model, run, dataset, found in _evaluations(settings, asked):
        how = tuple((name, words(value)) for name, value in sorted(how_asked(found.scores).items()))
        place = _Place(found.folder.parent.name, found.scores["metric"], how)
        labels.setdefault(place, f"{_dataset(run.config, dataset)} {place.split}, {place.metric}")
        scores.setdefault(model, {}).setdefault(place, []).extend([] if found.value is None else [found.value])
    rows = [
        [model.name, *[_cell(model, scores[model].get(place, [])) for place in labels], model.origin]
        for model in sorted(scores)
    ]
    headers = ["model", *_unique(labels), "made by"]
    remark = "Trained models: mean ± standard deviation over their seeds."
    return Table("Models side by side", "l" + "r" * len(labels) + "w", headers, rows, [remark])


def _evaluations(
    settings: Sequence[Setting], asked: Sequence[RunRecord]
) -> Iterator[tuple[_Model, RunRecord, str, Evaluation]]:
    """(model, the run it was asked in, dataset, evaluation)"""
    for run in [*asked, *[run for setting in settings for run in setting.runs]]:
        yield from ((_untrained(run.config), run, one.dataset, one.before) for one in run.splits if one.before)
    for setting in settings:
        for run in setting.runs:
            model = _Model(_TRAINED, setting.name, f"{run.config.adapter.method} training of {run.config.model.base}")
            yield from ((model, run, one.dataset, one.after) for one in run.splits if one.after)


def _untrained(config: Config) -> _Model:
    """Its name says what of the model's settings is not as by default, if answers depend on it."""
    base = config.model.base
    group = _MERGES if _merge_record(base) else _BASES
    known = {name: getattr(config.model, name) for name in _LOADED}
    told = [f"{_LOADED[name]}{value}" for name, value in known.items() if value != Model.model_fields[name].default]
    return _Model(group, ", ".join([base, *told]), origin_of(base))


def origin_of(base: str) -> str:
    """How a model that a config names as its base was made."""
    if merge := _merge_record(base):
        models = [f"{one['model']} (weight {one['weight']:g})" for one in merge["recipe"]["models"]]
        return f"{merge['recipe']['method']} of {', '.join(models)}: {merge['formula']}"
    if looks_local(base) and not Path(base).expanduser().is_dir():
        return "its folder is not there"
    return "base model"


def _merge_record(base: str) -> dict[str, Any] | None:
    path = Path(base).expanduser() / MERGE_RECORD
    return files.read_json(path) if looks_local(base) and path.is_file() else None


def _dataset(config: Config, dataset: str) -> str:
    """A run's own dataset by the config's name, as others name it with `--data`."""
    return config.name if dataset == config.data.source else dataset


def _unique(labels: dict[_Place, str]) -> list[str]:
    """Equal labels get that in which their questions differ; of the rows, the beginning of their fingerprint."""
    return [f"{text}{_difference(place, labels)}" for place, text in labels.items()]


def _difference(place: _Place, labels: dict[_Place, str]) -> str:
    same = [other.asked for other, text in labels.items() if text == labels[place]]
    own = [(name, value) for name, value in place.asked if not all((name, value) in asked for asked in same)]
    told = [value[:8] if name == "fingerprint" else f"{name}={value}" for name, value in own]
    return f" ({', '.join(told)})" if told else ""


def _cell(model: _Model, values: Sequence[float]) -> str:
    """Several runs tell the same score of one base model; it is no spread."""
    counted = values if model.group == _TRAINED else sorted(set(values))
    return values_text(counted)
