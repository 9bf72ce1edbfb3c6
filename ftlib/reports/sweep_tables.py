"""Tables of a sweep report: leaderboard, effect of each key, all runs, other datasets, model comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ftlib.config.schema import Config, Model
from ftlib.metrics.comparability import comparable_settings
from ftlib.metrics.formatting import format_interval, format_value
from ftlib.reports.run_record import (
    BEFORE,
    EvaluationResult,
    RunRecord,
    SplitRecord,
    describe_state,
    interruptions,
    merge_record,
    origin_of,
)
from ftlib.reports.sweep_stats import (
    REPORT_SPLIT,
    SELECTION_SPLIT,
    TRAINED_WITH,
    RunGroup,
    SeedStatistics,
    comparison_groups,
    evaluated_on_different_rows,
    format_field,
    own_score,
    rows_of,
    seed_statistics,
    unlike_settings,
)
from ftlib.reports.tables import NO_VALUE, Table

_OVER_SEEDS = "mean ± standard deviation over the seeds; interval of that mean by Student's t"


class _LeaderboardPlace(NamedTuple):
    """A column: a metric on the same rows, by fingerprint."""

    dataset: str
    split: str
    metric: str
    rows: str
    unit: str


def leaderboards(groups: Sequence[RunGroup]) -> list[Table]:
    """Return a table per metric and dataset: settings ranked by valid, with their scores on test."""
    boards = comparison_groups(groups)
    several = len(boards) > 1
    return [_leaderboard(group_label(board) if several else "", board) for board in boards if board[0].metric]


def group_label(groups: Sequence[RunGroup]) -> str:
    """Return the config names of a comparison group."""
    return ", ".join(dict.fromkeys(run.config.name for group in groups for run in group.runs))


def _leaderboard(column: str, groups: Sequence[RunGroup]) -> Table:
    metric, lower = groups[0].metric, not groups[0].higher_is_better
    headers = [
        "setting",
        "seeds",
        SELECTION_SPLIT,
        "95 % interval",
        REPORT_SPLIT,
        "95 % interval",
        f"{SELECTION_SPLIT} before",
    ]
    remark = f"{metric}: {_OVER_SEEDS}. Ranked by {SELECTION_SPLIT}{', lower is better' * lower}; "
    remark += f"{REPORT_SPLIT} is not used for the ranking."
    missing = [group.name for group in groups if group.seed_statistics(SELECTION_SPLIT) is None]
    unranked = [f"Not ranked, no scores on {SELECTION_SPLIT}: {'; '.join(missing)}."] if missing else []
    title = f"Leaderboard, {metric}{column and ' on '}{column}"
    remarks = [*_row_remarks(groups), remark, *unranked]
    return Table(title, "lrrrrrr", headers, [_row(one) for one in groups], remarks)


def settings_remarks(groups: Sequence[Sequence[RunRecord]], splits: Sequence[str]) -> Iterator[str]:
    """Yield remarks about compared scores whose evaluations had different settings, and about those left out."""
    for split in splits:
        for name, values in unlike_settings(groups, split).items():
            shown = ", ".join("not set" if value is None else format_field(value) for value in values[:4])
            yield (f"Not alike: the evaluations on {split} differ in {name} ({shown}), which may explain differences.")
    for runs in groups:
        seeds = [run.config.seed for run in runs]
        for run in (run for number, run in enumerate(runs) if run.config.seed in seeds[:number]):
            yield f"{run.name} has the config and the seed of another run here; as a copy it is not counted as a seed."
    left_out = sum(len(run.other_splits) for runs in groups for run in runs)
    if left_out:
        yield (
            f"{left_out} evaluation{'s' * (left_out > 1)} with other settings than the run's config "
            f"{'are' if left_out > 1 else 'is'} not in this table; see the reports of the runs."
        )
    if damaged := sum(len(run.damaged) for runs in groups for run in runs):
        yield f"{damaged} damaged evaluation{'s' * (damaged > 1)} left out; see the reports of the runs."


def _row_remarks(groups: Sequence[RunGroup]) -> Iterator[str]:
    """Yield remarks about scores on different rows or with different settings."""
    yield from settings_remarks([group.runs for group in groups], (SELECTION_SPLIT, REPORT_SPLIT))
    for split in (SELECTION_SPLIT, REPORT_SPLIT):
        if evaluated_on_different_rows([group.runs for group in groups], split):
            yield f"These settings were evaluated on different rows of {split}, which may explain differences."
        elif any(len(rows_of(group.runs, split)) > 1 for group in groups):
            yield f"The runs of a setting were evaluated on different rows of {split}, which may explain part of ±."


def _row(group: RunGroup) -> list[str]:
    chosen, reported = group.seed_statistics(SELECTION_SPLIT), group.seed_statistics(REPORT_SPLIT)
    before = group.seed_statistics(SELECTION_SPLIT, BEFORE)
    counted = f"{chosen.n if chosen else 0} of {len(group.different_runs)}"
    return [
        group.name,
        counted,
        *_cells(chosen, group.unit),
        *_cells(reported, group.unit),
        format_value(before.mean if before else None, group.unit, 3),
    ]


def _cells(found: SeedStatistics | None, unit: str) -> list[str]:
    return [format_statistics(found, unit), format_interval(found.interval if found else None, unit, 3)]


def format_statistics(found: SeedStatistics | None, unit: str) -> str:
    """Return mean ± sd; the mean alone for one value, a placeholder for none."""
    if found is None:
        return NO_VALUE
    if found.sd is None:
        return format_value(found.mean, unit, 3)
    return f"{format_value(found.mean, unit, 3).removesuffix(' %')} ± {format_value(found.sd, unit, 3)}"


def format_values(values: Sequence[float], unit: str) -> str:
    """Return `format_statistics` of values."""
    return format_statistics(seed_statistics(values) if values else None, unit)


def effects(groups: Sequence[RunGroup]) -> list[Table]:
    """Return a table for each varied key with the mean score of its values; empty for sweeps of one key."""
    return [table for board in comparison_groups(groups) for table in _effects(board)]


def _effects(board: Sequence[RunGroup]) -> list[Table]:
    keys = [key for key in board[0].values if len({group.values[key] for group in board}) > 1]
    return [_effect(key, board) for key in keys] if len(keys) > 1 else []


def _effect(key: str, groups: Sequence[RunGroup]) -> Table:
    runs: dict[str, list[RunRecord]] = {}
    for group in groups:
        runs.setdefault(group.values[key], []).extend(group.runs)
    rows = []
    for value, members in runs.items():
        scores = [score for run in members if (score := own_score(run, SELECTION_SPLIT)) is not None]
        rows.append([value, str(len(scores)), format_values(scores, groups[0].unit)])
    remarks = [f"Mean ± standard deviation on {SELECTION_SPLIT} over all runs with that value."]
    remarks += settings_remarks(list(runs.values()), [SELECTION_SPLIT])
    if evaluated_on_different_rows(runs.values(), SELECTION_SPLIT):
        remarks.insert(
            0, f"These values were evaluated on different rows of {SELECTION_SPLIT}, which may explain differences."
        )
    return Table(f"Effect of {key}", "lrr", [key, "runs", SELECTION_SPLIT], rows, remarks)


def runs_table(groups: Sequence[RunGroup]) -> Table:
    """Return a table of all training runs with their status."""
    headers = ["run", "setting", "seed", "state", "steps", "GPU-h", SELECTION_SPLIT, REPORT_SPLIT, "details"]
    rows = [_run_row(group, run) for group in groups for run in group.runs]
    return Table("Runs", "lwrlrrrrl", headers, rows)


def _run_row(group: RunGroup, run: RunRecord) -> list[str]:
    step = f"{run.metrics[-1]['step']:,}" if run.metrics else NO_VALUE
    scores = [format_value(own_score(run, split), group.unit, 3) for split in (SELECTION_SPLIT, REPORT_SPLIT)]
    told = "; ".join(filter(None, (interruptions(run), " ".join(run.status.reason.split()))))
    known = [run.name, group.name, str(run.config.seed), describe_state(run)[0], step, f"{run.usage.hours:.2f}"]
    return [*known, *scores, told]


def cross_table(groups: Sequence[RunGroup]) -> Table | None:
    """Return scores of all settings on all evaluated datasets and splits; None if there are only the runs' own."""
    columns = list(dict.fromkeys(column for group in groups for column in _scores(group)))
    if len({column.dataset for column in columns}) < 2:
        return None
    headers = ["setting", *[_header(column, columns) for column in columns]]
    rows = []
    for group in groups:
        scores = _scores(group)
        rows.append([group.name, *[format_values(scores.get(column, []), column.unit) for column in columns]])
    remarks = [f"Main metric after training, {_OVER_SEEDS.split(';')[0]}."]
    remarks += _unlike_columns(groups, columns)
    return Table("Across datasets", "l" + "r" * len(columns), headers, rows, remarks)


def _unlike_columns(groups: Sequence[RunGroup], columns: Sequence[_LeaderboardPlace]) -> Iterator[str]:
    """Yield remarks about columns with evaluations of different settings."""
    for column in columns:
        found: dict[str, dict[str, None]] = {}
        for group in groups:
            for run in group.runs:
                for split in run.splits:
                    if split.after and _place(split, split.after) == column:
                        for name, value in comparable_settings(split.after.scores).items():
                            found.setdefault(name, {})[format_field(value)] = None
        unlike = {name: list(values) for name, values in found.items() if len(values) > 1 and name not in TRAINED_WITH}
        for name, values in unlike.items():
            where = f"{column.dataset} {column.split}"
            yield f"Not alike: the evaluations on {where} differ in {name} ({', '.join(values[:4])})."


def _place(split: SplitRecord, after: EvaluationResult) -> _LeaderboardPlace:
    return _LeaderboardPlace(split.dataset, split.split, after.scores["metric"], after.rows, after.unit)


def _scores(group: RunGroup) -> dict[_LeaderboardPlace, list[float]]:
    """Return column → main metric after training of all evaluated runs."""
    found: dict[_LeaderboardPlace, list[float]] = {}
    for run in group.runs:
        for split in run.splits:
            if after := split.after:
                column = _place(split, after)
                found.setdefault(column, []).extend([] if after.value is None else [after.value])
    return found


def _header(column: _LeaderboardPlace, columns: Sequence[_LeaderboardPlace]) -> str:
    """Return a column header; columns of the same name get metric and a prefix of the fingerprint."""
    name = f"{column.dataset} {column.split}"
    if [(one.dataset, one.split) for one in columns].count((column.dataset, column.split)) == 1:
        return name
    return f"{name}, {column.metric} ({column.rows[:8]})"


# Comparison of models on everything that was evaluated: the base, runs trained from it, and merges of these.
#
# A merged model is evaluated with `ftlib evaluate CONFIG model.base=MERGED --before`; its folder contains `merge.json`
# with the recipe.

_BASES, _TRAINED, _MERGES = range(3)
_LOADED = {
    "revision": "revision ",
    "dtype": "",
    "quantization": "",
    "final_softcap": "final_softcap ",
    "resize": "resize ",
    "max_length": "max_length ",
}
"""Settings of a model that affect its answers → prefix of their values."""


class _ModelRow(NamedTuple):
    """A row: group, name and origin."""

    group: int
    name: str
    origin: str


class _ModelsPlace(NamedTuple):
    """A column: the same rows of a dataset (by fingerprint), evaluation settings and metric."""

    split: str
    metric: str
    unit: str
    settings: tuple[tuple[str, str], ...]


def models_table(groups: Sequence[RunGroup], asked: Sequence[RunRecord]) -> Table | None:
    """Return a row for each base, setting and merge, a column for each dataset, split and metric; None without `asked`.

    Args:
        groups: of the trained runs.
        asked: runs whose models were only evaluated.
    """
    if not asked:
        return None
    scores: dict[_ModelRow, dict[_ModelsPlace, list[float]]] = {}
    labels: dict[_ModelsPlace, str] = {}
    for model, run, dataset, found in _evaluations(groups, asked):
        how = tuple((name, format_field(value)) for name, value in sorted(comparable_settings(found.scores).items()))
        column = _ModelsPlace(found.folder.parent.name, found.scores["metric"], found.unit, how)
        labels.setdefault(column, f"{_dataset(run.config, dataset)} {column.split}, {column.metric}")
        scores.setdefault(model, {}).setdefault(column, []).extend([] if found.value is None else [found.value])
    rows = [
        [model.name, *[_cell(model, scores[model].get(column, []), column.unit) for column in labels], model.origin]
        for model in sorted(scores)
    ]
    headers = ["model", *_unique(labels), "made by"]
    remark = "Trained models: mean ± standard deviation over their seeds."
    return Table("Models side by side", "l" + "r" * len(labels) + "w", headers, rows, [remark])


def _evaluations(
    groups: Sequence[RunGroup], asked: Sequence[RunRecord]
) -> Iterator[tuple[_ModelRow, RunRecord, str, EvaluationResult]]:
    """Yield (model, run of the evaluation, dataset, evaluation)."""
    for run in [*asked, *[run for group in groups for run in group.runs]]:
        yield from ((_base_model_row(run.config), run, one.dataset, one.before) for one in run.splits if one.before)
    for group in groups:
        for run in group.runs:
            model = _ModelRow(_TRAINED, group.name, f"{run.config.adapter.method} training of {run.config.model.base}")
            yield from ((model, run, one.dataset, one.after) for one in run.splits if one.after)


def _base_model_row(config: Config) -> _ModelRow:
    """Return the row of a base model; its name contains settings that affect answers and are not defaults."""
    base = config.model.base
    group = _MERGES if merge_record(base) else _BASES
    known = {name: getattr(config.model, name) for name in _LOADED}
    told = [f"{_LOADED[name]}{value}" for name, value in known.items() if value != Model.model_fields[name].default]
    return _ModelRow(group, ", ".join([base, *told]), origin_of(base))


def _dataset(config: Config, dataset: str) -> str:
    """Return the name of a dataset; a run's own dataset has the config's name, as in `--data`."""
    return config.name if dataset == config.data.source else dataset


def _unique(labels: dict[_ModelsPlace, str]) -> list[str]:
    """Make equal labels unique with the differing settings, or a prefix of the fingerprint."""
    return [f"{text}{_difference(column, labels)}" for column, text in labels.items()]


def _difference(column: _ModelsPlace, labels: dict[_ModelsPlace, str]) -> str:
    same = [other.settings for other, text in labels.items() if text == labels[column]]
    own = [(name, value) for name, value in column.settings if not all((name, value) in asked for asked in same)]
    told = [value[:8] if name == "fingerprint" else f"{name}={value}" for name, value in own]
    return f" ({', '.join(told)})" if told else ""


def _cell(model: _ModelRow, values: Sequence[float], unit: str) -> str:
    """Return a cell; equal scores of one base model from several runs have no ±."""
    counted = values if model.group == _TRAINED else sorted(set(values))
    return format_values(counted, unit)
