"""What a sweep found, as tables: settings in their order, the effect of each key, every run, other datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ftlib.config.schema import Config, Model
from ftlib.metrics.comparability import comparable_settings
from ftlib.reports.run_record import (
    BEFORE,
    EvaluationResult,
    RunRecord,
    describe_state,
    interruptions,
    merge_record,
    origin_of,
)
from ftlib.reports.sweep_stats import (
    REPORT_SPLIT,
    SELECTION_SPLIT,
    RunGroup,
    SeedStatistics,
    comparison_groups,
    evaluated_on_different_rows,
    format_field,
    own_score,
    rows_of,
    seed_statistics,
)
from ftlib.reports.tables import NO_VALUE, Table

_OVER_SEEDS = "mean ± standard deviation over the seeds; interval of that mean by Student's t"


class _LeaderboardPlace(NamedTuple):
    """A column: one metric on the same rows, by their fingerprint."""

    dataset: str
    split: str
    metric: str
    rows: str


def leaderboards(groups: Sequence[RunGroup]) -> list[Table]:
    """A table per metric and dataset: settings ranked by valid, with their scores on test beside."""
    boards = comparison_groups(groups)
    several = len(boards) > 1
    return [_leaderboard(group_label(board) if several else "", board) for board in boards if board[0].metric]


def group_label(groups: Sequence[RunGroup]) -> str:
    """What the settings of a contest were trained for, by the names of their configs."""
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
    remark += f"{REPORT_SPLIT} had no part in it."
    missing = [group.name for group in groups if group.seed_statistics(SELECTION_SPLIT) is None]
    unranked = [f"Not ranked, for want of scores on {SELECTION_SPLIT}: {'; '.join(missing)}."] if missing else []
    title = f"Leaderboard, {metric}{column and ' on '}{column}"
    remarks = [*_row_remarks(groups), remark, *unranked]
    return Table(title, "lrrrrrr", headers, [_row(one) for one in groups], remarks)


def _row_remarks(groups: Sequence[RunGroup]) -> Iterator[str]:
    """Scores on different rows differ by the rows, too."""
    for split in (SELECTION_SPLIT, REPORT_SPLIT):
        if evaluated_on_different_rows([group.runs for group in groups], split):
            yield f"These settings were not all asked the same rows of {split}: differences may be the rows'."
        elif any(len(rows_of(group.runs, split)) > 1 for group in groups):
            yield f"The runs of a setting were not all asked the same rows of {split}: part of ± may be the rows'."


def _row(group: RunGroup) -> list[str]:
    chosen, reported = group.seed_statistics(SELECTION_SPLIT), group.seed_statistics(REPORT_SPLIT)
    before = group.seed_statistics(SELECTION_SPLIT, BEFORE)
    counted = f"{chosen.n if chosen else 0} of {len(group.runs)}"
    return [group.name, counted, *_cells(chosen), *_cells(reported), f"{before.mean:.3f}" if before else NO_VALUE]


def _cells(found: SeedStatistics | None) -> list[str]:
    return [
        format_statistics(found),
        f"{found.interval[0]:.3f}–{found.interval[1]:.3f}" if found and found.interval else NO_VALUE,
    ]


def format_statistics(found: SeedStatistics | None) -> str:
    """mean ± sd, or what there is of it."""
    if found is None:
        return NO_VALUE
    return f"{found.mean:.3f}" if found.sd is None else f"{found.mean:.3f} ± {found.sd:.3f}"


def format_values(values: Sequence[float]) -> str:
    """`format_statistics` of what values there are."""
    return format_statistics(seed_statistics(values) if values else None)


def effects(groups: Sequence[RunGroup]) -> list[Table]:
    """For each key that varies, what its values come to over everything else; for sweeps of two keys and more."""
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
        rows.append([value, str(len(scores)), format_values(scores)])
    remarks = [
        f"Mean ± standard deviation on {SELECTION_SPLIT} over all runs with that value, whatever their other settings."
    ]
    if evaluated_on_different_rows(runs.values(), SELECTION_SPLIT):
        remarks.insert(
            0, f"These values were not all asked the same rows of {SELECTION_SPLIT}: differences may be the rows'."
        )
    return Table(f"Effect of {key}", "lrr", [key, "runs", SELECTION_SPLIT], rows, remarks)


def runs_table(groups: Sequence[RunGroup]) -> Table:
    """Every run that is trained, with what became of it."""
    headers = ["run", "setting", "seed", "state", "steps", "GPU-h", SELECTION_SPLIT, REPORT_SPLIT, "what happened"]
    rows = [_run_row(group, run) for group in groups for run in group.runs]
    return Table("Runs", "llrlrrrrl", headers, rows)


def _run_row(group: RunGroup, run: RunRecord) -> list[str]:
    step = f"{run.metrics[-1]['step']:,}" if run.metrics else NO_VALUE
    scores = [
        NO_VALUE if (score := own_score(run, split)) is None else f"{score:.3f}"
        for split in (SELECTION_SPLIT, REPORT_SPLIT)
    ]
    told = "; ".join(filter(None, (interruptions(run), " ".join(run.status.reason.split()))))
    known = [run.name, group.name, str(run.config.seed), describe_state(run)[0], step, f"{run.usage.hours:.2f}"]
    return [*known, *scores, told]


def cross_table(groups: Sequence[RunGroup]) -> Table | None:
    """Every setting on every dataset and split that any run was asked on; None if there is only the runs' own."""
    columns = list(dict.fromkeys(column for group in groups for column in _scores(group)))
    if len({column.dataset for column in columns}) < 2:
        return None
    headers = ["setting", *[_header(column, columns) for column in columns]]
    rows = []
    for group in groups:
        scores = _scores(group)
        rows.append([group.name, *[format_values(scores.get(column, [])) for column in columns]])
    remark = f"Main metric after training, {_OVER_SEEDS.split(';')[0]}."
    return Table("Across datasets", "l" + "r" * len(columns), headers, rows, [remark])


def _scores(group: RunGroup) -> dict[_LeaderboardPlace, list[float]]:
    """The main metric after training, of every run that was asked there."""
    found: dict[_LeaderboardPlace, list[float]] = {}
    for run in group.runs:
        for split in run.splits:
            if after := split.after:
                column = _LeaderboardPlace(split.dataset, split.split, after.scores["metric"], after.rows)
                found.setdefault(column, []).extend([] if after.value is None else [after.value])
    return found


def _header(column: _LeaderboardPlace, columns: Sequence[_LeaderboardPlace]) -> str:
    """Places of one name are told apart by metric and by the beginning of the rows' fingerprint."""
    name = f"{column.dataset} {column.split}"
    if [(one.dataset, one.split) for one in columns].count((column.dataset, column.split)) == 1:
        return name
    return f"{name}, {column.metric} ({column.rows[:8]})"


# Models side by side on everything that was asked: the base, the runs trained from it, and merges of those.
#
# A merged model is asked by `ftlib evaluate CONFIG model.base=MERGED --before`; the folder of such a model holds
# `merge.json`, which tells how it was made.

_BASES, _TRAINED, _MERGES = range(3)
_LOADED = {
    "revision": "revision ",
    "dtype": "",
    "quantization": "",
    "final_softcap": "final_softcap ",
    "max_length": "max_length ",
}
"""The settings of a model that its answers depend on → what is said before their values."""


class _ModelRow(NamedTuple):
    """A row: which group it stands in, its name, and where it comes from."""

    group: int
    name: str
    origin: str


class _ModelsPlace(NamedTuple):
    """A column: the same rows of a dataset (by their fingerprint), asked in the same way for the same metric."""

    split: str
    metric: str
    settings: tuple[tuple[str, str], ...]


def models_table(groups: Sequence[RunGroup], asked: Sequence[RunRecord]) -> Table | None:
    """A row for each base, setting and merge, a column for each dataset, split and metric; None if all were trained.

    Args:
        groups: of the trained runs.
        asked: runs whose models were only asked.
    """
    if not asked:
        return None
    scores: dict[_ModelRow, dict[_ModelsPlace, list[float]]] = {}
    labels: dict[_ModelsPlace, str] = {}
    for model, run, dataset, found in _evaluations(groups, asked):
        how = tuple((name, format_field(value)) for name, value in sorted(comparable_settings(found.scores).items()))
        column = _ModelsPlace(found.folder.parent.name, found.scores["metric"], how)
        labels.setdefault(column, f"{_dataset(run.config, dataset)} {column.split}, {column.metric}")
        scores.setdefault(model, {}).setdefault(column, []).extend([] if found.value is None else [found.value])
    rows = [
        [model.name, *[_cell(model, scores[model].get(column, [])) for column in labels], model.origin]
        for model in sorted(scores)
    ]
    headers = ["model", *_unique(labels), "made by"]
    remark = "Trained models: mean ± standard deviation over their seeds."
    return Table("Models side by side", "l" + "r" * len(labels) + "w", headers, rows, [remark])


def _evaluations(
    groups: Sequence[RunGroup], asked: Sequence[RunRecord]
) -> Iterator[tuple[_ModelRow, RunRecord, str, EvaluationResult]]:
    """(model, the run it was asked in, dataset, evaluation)"""
    for run in [*asked, *[run for group in groups for run in group.runs]]:
        yield from ((_base_model_row(run.config), run, one.dataset, one.before) for one in run.splits if one.before)
    for group in groups:
        for run in group.runs:
            model = _ModelRow(_TRAINED, group.name, f"{run.config.adapter.method} training of {run.config.model.base}")
            yield from ((model, run, one.dataset, one.after) for one in run.splits if one.after)


def _base_model_row(config: Config) -> _ModelRow:
    """Its name says what of the model's settings is not as by default, if answers depend on it."""
    base = config.model.base
    group = _MERGES if merge_record(base) else _BASES
    known = {name: getattr(config.model, name) for name in _LOADED}
    told = [f"{_LOADED[name]}{value}" for name, value in known.items() if value != Model.model_fields[name].default]
    return _ModelRow(group, ", ".join([base, *told]), origin_of(base))


def _dataset(config: Config, dataset: str) -> str:
    """A run's own dataset by the config's name, as others name it with `--data`."""
    return config.name if dataset == config.data.source else dataset


def _unique(labels: dict[_ModelsPlace, str]) -> list[str]:
    """Equal labels get that in which their questions differ; of the rows, the beginning of their fingerprint."""
    return [f"{text}{_difference(column, labels)}" for column, text in labels.items()]


def _difference(column: _ModelsPlace, labels: dict[_ModelsPlace, str]) -> str:
    same = [other.settings for other, text in labels.items() if text == labels[column]]
    own = [(name, value) for name, value in column.settings if not all((name, value) in asked for asked in same)]
    told = [value[:8] if name == "fingerprint" else f"{name}={value}" for name, value in own]
    return f" ({', '.join(told)})" if told else ""


def _cell(model: _ModelRow, values: Sequence[float]) -> str:
    """Several runs tell the same score of one base model; it is no spread."""
    counted = values if model.group == _TRAINED else sorted(set(values))
    return format_values(counted)
