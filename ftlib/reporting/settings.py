"""Runs that differ in their seeds only, put together: what a sweep compares."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.identity import identity_fields, lasting
from ftlib.reporting.collect import AFTER, Evaluation, RunRecord
from ftlib.reporting.seeds import Spread, spread_of

CHOICE, REPORT = "valid", "test"
"""The split that a setting is chosen on, and the one that it is reported on."""

_SEED = "seed"
_SAME_SCORES = ("splits", "before", "batch_size", "prompts", "without_context", "loss")
"""What `evaluation` says beside how answers are found and judged."""


@dataclass(frozen=True)
class Setting:
    """Runs of equal config but for the seed.

    Attributes:
        name: that of its runs' config, if no other setting has it; else `values` in words.
        values: dotted key → value in words, of the keys in which the settings differ.
        metric: the main metric of its task; None before any evaluation.
        higher_is_better: the metric's direction.
        runs: its members, by seed.
    """

    name: str
    values: Mapping[str, str]
    metric: str | None
    higher_is_better: bool
    runs: Sequence[RunRecord]

    @property
    def contest(self) -> tuple[str, ...]:
        """The metric and the data: only settings that have both in common can be ranked."""
        data = self.runs[0].config.data
        return self.metric or "~", data.source, data.root, data.file, *[part.name for part in data.parts]

    @property
    def best_run(self) -> RunRecord:
        """By its score on valid; one without a score is behind all others."""
        return max(self.runs, key=lambda run: _merit(own_score(run, CHOICE), self.higher_is_better))

    def spread(self, split: str, when: str = AFTER) -> Spread | None:
        """Over the seeds that have a score of the run's own dataset; None if no run has."""
        scores = [score for run in self.runs if (score := own_score(run, split, when)) is not None]
        return spread_of(scores) if scores else None


def contests(settings: Sequence[Setting]) -> list[list[Setting]]:
    """The settings that can be ranked with one another, in their order."""
    found: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        found.setdefault(setting.contest, []).append(setting)
    return list(found.values())


def own_score(record: RunRecord, split: str, when: str = AFTER) -> float | None:
    """The main metric of a run's own dataset; None without an evaluation, or where it is undefined."""
    found = _own_evaluation(record, split, when)
    return found.value if found else None


def rows_of(runs: Sequence[RunRecord], split: str) -> frozenset[str]:
    """The fingerprints of the rows of their own dataset that the scores of runs after training rest on."""
    found = [_own_evaluation(run, split, AFTER) for run in runs]
    return frozenset(one.rows for one in found if one and one.value is not None)


def asked_unlike_rows(groups: Iterable[Sequence[RunRecord]], split: str) -> bool:
    """Whether some of what is compared was asked other rows than the rest; what has no score yet was asked none."""
    return len({rows for runs in groups if (rows := rows_of(runs, split))}) > 1


def _own_evaluation(record: RunRecord, split: str, when: str) -> Evaluation | None:
    for known in record.splits:
        if (known.dataset, known.split) == (record.config.data.source, split):
            return known.by_when.get(when)
    return None


def group_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Settings by contest, best on valid first; those without a score there come last, by name. Test has no say."""
    flat = [dict(_flatten(_telling(record))) for record in records]
    keys = varied_keys(flat)
    members: dict[tuple[str, ...], list[RunRecord]] = {}
    for record, fields in zip(records, flat, strict=True):
        members.setdefault(tuple(fields.get(key, "–") for key in keys), []).append(record)
    names = [runs[0].config.name for runs in members.values()]
    settings = [
        _setting(name if names.count(name) == 1 else "", dict(zip(keys, values, strict=True)), runs)
        for name, (values, runs) in zip(names, members.items(), strict=True)
    ]
    return sorted(settings, key=_rank)


def trained_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Settings of runs that are or were to be trained; those whose model was only asked compete with nobody."""
    return group_settings([record for record in records if not record.only_asked])


def _telling(record: RunRecord) -> dict[str, Any]:
    """The fields that a score depends on: those that name the run, and how it was asked."""
    config = record.config
    asked = lasting(config.evaluation, {"Evaluation": _SAME_SCORES})
    return {"name": config.name, **identity_fields(config, record.recipe), "evaluation": asked}


def varied_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values differ, the seed apart."""
    every = dict.fromkeys(key for fields in configs for key in fields)
    return [key for key in every if key != _SEED and len({fields.get(key) for fields in configs}) > 1]


def _setting(name: str, values: dict[str, str], runs: list[RunRecord]) -> Setting:
    latest = next((run.splits[0].latest for run in runs if run.splits), None)
    metric, higher = (latest.scores["metric"], latest.higher_is_better) if latest else (None, True)
    return Setting(name or _told(values), values, metric, higher, sorted(runs, key=lambda run: run.config.seed))


def _told(values: dict[str, str]) -> str:
    """Keys by their last part where that is clear, and their values; `seed` alone is the run's."""
    ends = [key.rpartition(".")[2] for key in values]
    known = zip(values.items(), ends, strict=True)
    return ", ".join(f"{end if end != _SEED and ends.count(end) == 1 else key}={value}" for (key, value), end in known)


def _rank(setting: Setting) -> tuple[tuple[str, ...], float, str]:
    found = setting.spread(CHOICE)
    return setting.contest, -_merit(found.mean if found else None, setting.higher_is_better), setting.name


def _merit(value: float | None, higher_is_better: bool) -> float:
    """What to order values by, the best having the highest; undefined ones come last."""
    if value is None:
        return -math.inf
    return value if higher_is_better else -value


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", words(value)


def words(value: Any) -> str:
    """Texts as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
