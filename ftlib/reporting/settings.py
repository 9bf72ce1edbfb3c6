"""Runs that differ in their seeds only, put together: what a sweep compares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.config import Config, identity_fields
from ftlib.reporting.collect import AFTER, RunRecord
from ftlib.reporting.seeds import Spread, spread_of

CHOICE, REPORT = "valid", "test"
"""The split that a setting is chosen on, and the one that it is reported on."""

_SEED = "seed"
_SAME_SCORES = ("splits", "before", "batch_size", "prompts", "without_context")
"""What `evaluation` says beside how answers are found and judged."""


@dataclass(frozen=True)
class Setting:
    """Runs of equal config but for the seed.

    Attributes:
        values: dotted key → value in words, of the keys in which the settings differ.
        metric: the main metric of its task; None before any evaluation.
        runs: its members, by seed.
    """

    values: Mapping[str, str]
    metric: str | None
    runs: Sequence[RunRecord]

    @property
    def name(self) -> str:
        """The setting in words, keys by their last part where that is clear; a lone setting has its runs' name."""
        ends = [key.rpartition(".")[2] for key in self.values]
        known = zip(self.values.items(), ends, strict=True)
        words = [f"{end if ends.count(end) == 1 else key}={value}" for (key, value), end in known]
        return ", ".join(words) or self.runs[0].config.name

    def spread(self, split: str, when: str = AFTER) -> Spread | None:
        """Over the seeds that have a score of the run's own dataset; None if no run has."""
        scores = [score for run in self.runs if (score := own_score(run, split, when)) is not None]
        return spread_of(scores) if scores else None


def own_score(record: RunRecord, split: str, when: str = AFTER) -> float | None:
    """The main metric of a run's own dataset."""
    for known in record.splits:
        if (known.dataset, known.split) == (record.config.data.source, split) and when in known.by_when:
            return float(known.by_when[when].scores["value"])
    return None


def group_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Settings, best on valid first; those without a score there come last, by name. Test has no say."""
    flat = [dict(_flatten(_telling(record.config))) for record in records]
    keys = varied_keys(flat)
    members: dict[tuple[str, ...], list[RunRecord]] = {}
    for record, fields in zip(records, flat, strict=True):
        members.setdefault(tuple(fields.get(key, "–") for key in keys), []).append(record)
    settings = [_setting(dict(zip(keys, values, strict=True)), runs) for values, runs in members.items()]
    return sorted(settings, key=_rank)


def trained_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Settings of runs that are or were to be trained; those whose model was only asked compete with nobody."""
    return group_settings([record for record in records if not record.only_asked])


def _telling(config: Config) -> dict[str, Any]:
    """The fields that a score depends on: those that name the run, and how it was asked."""
    raw = config.model_dump()
    asked = {key: value for key, value in raw["evaluation"].items() if key not in _SAME_SCORES}
    return {"name": config.name, **identity_fields(raw), "evaluation": asked}


def varied_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values differ, the seed apart."""
    every = dict.fromkeys(key for fields in configs for key in fields)
    return [key for key in every if key != _SEED and len({fields.get(key) for fields in configs}) > 1]


def _setting(values: dict[str, str], runs: list[RunRecord]) -> Setting:
    scored = [run.splits[0].latest.scores["metric"] for run in runs if run.splits]
    return Setting(values, scored[0] if scored else None, sorted(runs, key=lambda run: run.config.seed))


def _rank(setting: Setting) -> tuple[str, bool, float, str]:
    found = setting.spread(CHOICE)
    return setting.metric or "~", found is None, -found.mean if found else 0.0, setting.name


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _words(value)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
