"""Group runs that differ only in their seeds: the settings that a sweep compares."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.config.identity import canonical_fields, identity_fields
from ftlib.core.metric_table import upper_limit
from ftlib.metrics.comparability import comparable_settings
from ftlib.metrics.student import student_quantile
from ftlib.reports.run_record import AFTER, EvaluationResult, RunRecord

SELECTION_SPLIT, REPORT_SPLIT = "valid", "test"
"""The split for choosing a setting, and the split for reporting."""

_SEED = "seed"
_SAME_SCORES = ("splits", "before", "batch_size", "prompts", "without_context", "loss")
"""Keys of `evaluation` that do not affect scores."""


@dataclass(frozen=True)
class RunGroup:
    """Runs whose configs differ only in the seed.

    Attributes:
        name: the name of the config, if no other setting has it; else `values` as text.
        values: dotted key → value as text, for the keys in which the settings differ.
        metric: the main metric of its task; None before any evaluation.
        higher_is_better: the metric's direction.
        runs: the runs, sorted by seed.
    """

    name: str
    values: Mapping[str, str]
    metric: str | None
    higher_is_better: bool
    runs: Sequence[RunRecord]

    @property
    def comparison_key(self) -> tuple[str, ...]:
        """Metric and data: only settings with the same key can be ranked."""
        data = self.runs[0].config.data
        own = [data.source, data.root, data.file, *[name for _, name in data.split_files]]
        return self.metric or "~", *own, *[part.name for part in data.parts]

    @property
    def best_run(self) -> RunRecord:
        """The run with the best score on valid; runs without a score come last."""
        return max(self.runs, key=lambda run: _sort_key(own_score(run, SELECTION_SPLIT), self.higher_is_better))

    @property
    def unit(self) -> str:
        """The metric's unit; "" before any evaluation."""
        return next((run.splits[0].latest.unit for run in self.runs if run.splits), "")

    @property
    def different_runs(self) -> list[RunRecord]:
        """The runs without copies: of runs with the same config, seed included, the first one."""
        return list({run.config.seed: run for run in reversed(self.runs)}.values())[::-1]

    def seed_statistics(self, split: str, when: str = AFTER) -> SeedStatistics | None:
        """Return statistics over the seeds with a score on the run's own dataset; None without scores."""
        scores = [score for run in self.different_runs if (score := own_score(run, split, when)) is not None]
        limit = upper_limit(self.runs[0].config.task, self.metric or "")
        return seed_statistics(scores, limit) if scores else None


def comparison_groups(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Return groups of settings that can be ranked together, in order."""
    found: dict[tuple[str, ...], list[RunGroup]] = {}
    for group in groups:
        found.setdefault(group.comparison_key, []).append(group)
    return list(found.values())


def own_score(record: RunRecord, split: str, when: str = AFTER) -> float | None:
    """Return the main metric on a run's own dataset; None without an evaluation, or if it is undefined."""
    found = _own_evaluation(record, split, when)
    return found.value if found else None


def rows_of(runs: Sequence[RunRecord], split: str) -> frozenset[str]:
    """Return the fingerprints of the evaluated rows of runs after training, on their own datasets."""
    found = [_own_evaluation(run, split, AFTER) for run in runs]
    return frozenset(one.rows for one in found if one and one.value is not None)


def evaluated_on_different_rows(groups: Iterable[Sequence[RunRecord]], split: str) -> bool:
    """Whether the compared runs were evaluated on different rows; runs without a score are ignored."""
    return len({rows for runs in groups if (rows := rows_of(runs, split))}) > 1


TRAINED_WITH = ("fingerprint", "split", "prompt", "prompts", "max_pixels", "chat_template")
"""Settings that belong to the data or to the trained model, which a ranking may compare."""


def unlike_settings(groups: Iterable[Sequence[RunRecord]], split: str) -> dict[str, list[Any]]:
    """Return the settings in which the evaluations of runs after training differ: name → its values.

    The rule of the metric is one of them. Rows are compared by `evaluated_on_different_rows`.
    """
    found = [_own_evaluation(run, split, AFTER) for runs in groups for run in runs]
    known = [comparable_settings(one.scores) for one in found if one and one.value is not None]
    names = dict.fromkeys(name for settings in known for name in settings if name not in TRAINED_WITH)
    values = {name: list({format_field(one.get(name)): one.get(name) for one in known}.values()) for name in names}
    return {name: different for name, different in values.items() if len(different) > 1}


def _own_evaluation(record: RunRecord, split: str, when: str) -> EvaluationResult | None:
    for known in record.splits:
        if (known.dataset, known.split) == (record.config.data.source, split):
            return known.by_when.get(when)
    return None


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Return settings by comparison group, best on valid first; settings without a score come last, by name."""
    flat = [dict(_flatten(_score_fields(record))) for record in records]
    keys = varied_keys(flat)
    members: dict[tuple[str, ...], list[RunRecord]] = {}
    for record, fields in zip(records, flat, strict=True):
        members.setdefault(tuple(fields.get(key, "–") for key in keys), []).append(record)
    names = [runs[0].config.name for runs in members.values()]
    groups = [
        _run_group(name if names.count(name) == 1 else "", dict(zip(keys, values, strict=True)), runs)
        for name, (values, runs) in zip(names, members.items(), strict=True)
    ]
    return sorted(groups, key=_rank)


def trained_groups(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Return the settings of runs with training, without models that were only evaluated."""
    return group_runs([record for record in records if not record.evaluated_only])


def _score_fields(record: RunRecord) -> dict[str, Any]:
    """Return the fields that a score depends on: those of the run ID, and evaluation settings."""
    config = record.config
    asked = canonical_fields(config.evaluation, {"Evaluation": _SAME_SCORES})
    return {"name": config.name, **identity_fields(config, record.recipe), "evaluation": asked}


def varied_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ, except the seed."""
    every = dict.fromkeys(key for fields in configs for key in fields)
    return [key for key in every if key != _SEED and len({fields.get(key) for fields in configs}) > 1]


def _run_group(name: str, values: dict[str, str], runs: list[RunRecord]) -> RunGroup:
    latest = next((run.splits[0].latest for run in runs if run.splits), None)
    metric, higher = (latest.scores["metric"], latest.higher_is_better) if latest else (None, True)
    return RunGroup(name or _group_label(values), values, metric, higher, sorted(runs, key=lambda run: run.config.seed))


def _group_label(values: dict[str, str]) -> str:
    """Return keys and values; a key is shortened to its last part if that is unique. `seed` is the run's seed."""
    ends = [key.rpartition(".")[2] for key in values]
    known = zip(values.items(), ends, strict=True)
    return ", ".join(f"{end if end != _SEED and ends.count(end) == 1 else key}={value}" for (key, value), end in known)


def _rank(group: RunGroup) -> tuple[tuple[str, ...], float, str]:
    found = group.seed_statistics(SELECTION_SPLIT)
    return group.comparison_key, -_sort_key(found.mean if found else None, group.higher_is_better), group.name


def _sort_key(value: float | None, higher_is_better: bool) -> float:
    """Return a sort key that is highest for the best value; undefined values come last."""
    if value is None:
        return -math.inf
    return value if higher_is_better else -value


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", format_field(value)


def format_field(value: Any) -> str:
    """Return text unchanged, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Statistics over seeds: mean, standard deviation, and Student's t interval of the mean.


@dataclass(frozen=True)
class SeedStatistics:
    """Mean and sample standard deviation (divisor n − 1; None for one value) of `n` runs.

    Attributes:
        interval: 95 % interval of the mean by Student's t, as if the runs were drawn independently; None for one value,
            and for equal ones, which tell nothing about the width.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


def seed_statistics(values: Sequence[float], limit: float | None = None) -> SeedStatistics:
    """Return the statistics of at least one value.

    Args:
        limit: the largest possible value of a metric whose smallest is 0; the interval does not go beyond them.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return SeedStatistics(len(values), mean, None, None)
    sd = statistics.stdev(values)
    if not sd:
        return SeedStatistics(len(values), mean, sd, None)
    reach = student_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    low, high = mean - reach, mean + reach
    if limit is not None and min(values) >= 0 and max(values) <= limit:
        low, high = max(0.0, low), min(limit, high)
    return SeedStatistics(len(values), mean, sd, (low, high))
