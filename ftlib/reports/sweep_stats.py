"""Runs that differ in their seeds only, put together: what a sweep compares."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.config.identity import canonical_fields, identity_fields
from ftlib.reports.run_record import AFTER, EvaluationResult, RunRecord

SELECTION_SPLIT, REPORT_SPLIT = "valid", "test"
"""The split that a setting is chosen on, and the one that it is reported on."""

_SEED = "seed"
_SAME_SCORES = ("splits", "before", "batch_size", "prompts", "without_context", "loss")
"""What `evaluation` says beside how answers are found and judged."""


@dataclass(frozen=True)
class RunGroup:
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
    def comparison_key(self) -> tuple[str, ...]:
        """The metric and the data: only settings that have both in common can be ranked."""
        data = self.runs[0].config.data
        own = [data.source, data.root, data.file, *[name for _, name in data.split_files]]
        return self.metric or "~", *own, *[part.name for part in data.parts]

    @property
    def best_run(self) -> RunRecord:
        """By its score on valid; one without a score is behind all others."""
        return max(self.runs, key=lambda run: _sort_key(own_score(run, SELECTION_SPLIT), self.higher_is_better))

    def seed_statistics(self, split: str, when: str = AFTER) -> SeedStatistics | None:
        """Over the seeds that have a score of the run's own dataset; None if no run has."""
        scores = [score for run in self.runs if (score := own_score(run, split, when)) is not None]
        return seed_statistics(scores) if scores else None


def comparison_groups(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """The settings that can be ranked with one another, in their order."""
    found: dict[tuple[str, ...], list[RunGroup]] = {}
    for group in groups:
        found.setdefault(group.comparison_key, []).append(group)
    return list(found.values())


def own_score(record: RunRecord, split: str, when: str = AFTER) -> float | None:
    """The main metric of a run's own dataset; None without an evaluation, or where it is undefined."""
    found = _own_evaluation(record, split, when)
    return found.value if found else None


def rows_of(runs: Sequence[RunRecord], split: str) -> frozenset[str]:
    """The fingerprints of the rows of their own dataset that the scores of runs after training rest on."""
    found = [_own_evaluation(run, split, AFTER) for run in runs]
    return frozenset(one.rows for one in found if one and one.value is not None)


def evaluated_on_different_rows(groups: Iterable[Sequence[RunRecord]], split: str) -> bool:
    """Whether some of what is compared was asked other rows than the rest; what has no score yet was asked none."""
    return len({rows for runs in groups if (rows := rows_of(runs, split))}) > 1


def _own_evaluation(record: RunRecord, split: str, when: str) -> EvaluationResult | None:
    for known in record.splits:
        if (known.dataset, known.split) == (record.config.data.source, split):
            return known.by_when.get(when)
    return None


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Settings by contest, best on valid first; those without a score there come last, by name. Test has no say."""
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
    """Settings of runs that are or were to be trained; those whose model was only asked compete with nobody."""
    return group_runs([record for record in records if not record.evaluated_only])


def _score_fields(record: RunRecord) -> dict[str, Any]:
    """The fields that a score depends on: those that name the run, and how it was asked."""
    config = record.config
    asked = canonical_fields(config.evaluation, {"Evaluation": _SAME_SCORES})
    return {"name": config.name, **identity_fields(config, record.recipe), "evaluation": asked}


def varied_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values differ, the seed apart."""
    every = dict.fromkeys(key for fields in configs for key in fields)
    return [key for key in every if key != _SEED and len({fields.get(key) for fields in configs}) > 1]


def _run_group(name: str, values: dict[str, str], runs: list[RunRecord]) -> RunGroup:
    latest = next((run.splits[0].latest for run in runs if run.splits), None)
    metric, higher = (latest.scores["metric"], latest.higher_is_better) if latest else (None, True)
    return RunGroup(name or _group_label(values), values, metric, higher, sorted(runs, key=lambda run: run.config.seed))


def _group_label(values: dict[str, str]) -> str:
    """Keys by their last part where that is clear, and their values; `seed` alone is the run's."""
    ends = [key.rpartition(".")[2] for key in values]
    known = zip(values.items(), ends, strict=True)
    return ", ".join(f"{end if end != _SEED and ends.count(end) == 1 else key}={value}" for (key, value), end in known)


def _rank(group: RunGroup) -> tuple[tuple[str, ...], float, str]:
    found = group.seed_statistics(SELECTION_SPLIT)
    return group.comparison_key, -_sort_key(found.mean if found else None, group.higher_is_better), group.name


def _sort_key(value: float | None, higher_is_better: bool) -> float:
    """What to order values by, the best having the highest; undefined ones come last."""
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
    """Texts as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Values of several seeds: mean, standard deviation, and Student's interval of the mean.


@dataclass(frozen=True)
class SeedStatistics:
    """Mean and sample standard deviation (divisor n − 1; None for one value) of `n` runs.

    Attributes:
        interval: 95 % interval of the mean by Student's t, as if the runs were drawn independently; None for one value.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


def seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Sum up at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return SeedStatistics(len(values), mean, None, None)
    sd = statistics.stdev(values)
    reach = student_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return SeedStatistics(len(values), mean, sd, (mean - reach, mean + reach))


def student_quantile(freedom: int, inside: float = 0.95) -> float:
    """The t with P(|T| < t) = `inside` for so many degrees of freedom.

    The probability is a finite series in the angle atan(t / √freedom) (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    ascends from 0 to 1; bisection finds the angle.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, freedom) < inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _student_probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan(angle))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for number in range(1 + odd, freedom, 2):
        series += term
        term *= cosine**2 * number / (number + 1)
    series *= math.sin(angle)
    return 2 / math.pi * (angle + series) if odd else series
