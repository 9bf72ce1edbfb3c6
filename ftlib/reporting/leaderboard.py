"""What a sweep found, as tables: settings in their order, the effect of each key, every run, other datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ftlib.reporting.collect import BEFORE, RunRecord
from ftlib.reporting.scores import NONE
from ftlib.reporting.seeds import Spread, spread_of
from ftlib.reporting.settings import CHOICE, REPORT, Setting, asked_unlike_rows, contests, own_score, rows_of
from ftlib.reporting.state import happened, state
from ftlib.reporting.tables import Table

_OVER_SEEDS = "mean ± standard deviation over the seeds; interval of that mean by Student's t"


class _Place(NamedTuple):
    """A column: one metric on the same rows, by their fingerprint."""

    dataset: str
    split: str
    metric: str
    rows: str


def leaderboards(settings: Sequence[Setting]) -> list[Table]:
    """A table per metric and dataset: settings ranked by valid, with their scores on test beside."""
    boards = contests(settings)
    several = len(boards) > 1
    return [_leaderboard(place_of(board) if several else "", board) for board in boards if board[0].metric]


def place_of(settings: Sequence[Setting]) -> str:
    """What the settings of a contest were trained for, by the names of their configs."""
    return ", ".join(dict.fromkeys(run.config.name for setting in settings for run in setting.runs))


def _leaderboard(place: str, settings: Sequence[Setting]) -> Table:
    metric, lower = settings[0].metric, not settings[0].higher_is_better
    headers = ["setting", "seeds", CHOICE, "95 % interval", REPORT, "95 % interval", f"{CHOICE} before"]
    remark = f"{metric}: {_OVER_SEEDS}. Ranked by {CHOICE}{', lower is better' * lower}; {REPORT} had no part in it."
    missing = [setting.name for setting in settings if setting.spread(CHOICE) is None]
    unranked = [f"Not ranked, for want of scores on {CHOICE}: {'; '.join(missing)}."] if missing else []
    title = f"Leaderboard, {metric}{place and ' on '}{place}"
    remarks = [*_row_remarks(settings), remark, *unranked]
    return Table(title, "lrrrrrr", headers, [_row(one) for one in settings], remarks)


def _row_remarks(settings: Sequence[Setting]) -> Iterator[str]:
    """Scores on different rows differ by the rows, too."""
    for split in (CHOICE, REPORT):
        if asked_unlike_rows([setting.runs for setting in settings], split):
            yield f"These settings were not all asked the same rows of {split}: differences may be the rows'."
        elif any(len(rows_of(setting.runs, split)) > 1 for setting in settings):
            yield f"The runs of a setting were not all asked the same rows of {split}: part of ± may be the rows'."


def _row(setting: Setting) -> list[str]:
    chosen, reported = setting.spread(CHOICE), setting.spread(REPORT)
    before = setting.spread(CHOICE, BEFORE)
    counted = f"{chosen.n if chosen else 0} of {len(setting.runs)}"
    return [setting.name, counted, *_cells(chosen), *_cells(reported), f"{before.mean:.3f}" if before else NONE]


def _cells(found: Spread | None) -> list[str]:
    return [
        spread_text(found),
        f"{found.interval[0]:.3f}–{found.interval[1]:.3f}" if found and found.interval else NONE,
    ]


def spread_text(found: Spread | None) -> str:
    """mean ± sd, or what there is of it."""
    if found is None:
        return NONE
    return f"{found.mean:.3f}" if found.sd is None else f"{found.mean:.3f} ± {found.sd:.3f}"


def values_text(values: Sequence[float]) -> str:
    """`spread_text` of what values there are."""
    return spread_text(spread_of(values) if values else None)


def effects(settings: Sequence[Setting]) -> list[Table]:
    """For each key that varies, what its values come to over everything else; for sweeps of two keys and more."""
    return [table for board in contests(settings) for table in _effects(board)]


def _effects(board: Sequence[Setting]) -> list[Table]:
    keys = [key for key in board[0].values if len({setting.values[key] for setting in board}) > 1]
    return [_effect(key, board) for key in keys] if len(keys) > 1 else []


def _effect(key: str, settings: Sequence[Setting]) -> Table:
    runs: dict[str, list[RunRecord]] = {}
    for setting in settings:
        runs.setdefault(setting.values[key], []).extend(setting.runs)
    rows = []
    for value, members in runs.items():
        scores = [score for run in members if (score := own_score(run, CHOICE)) is not None]
        rows.append([value, str(len(scores)), values_text(scores)])
    remarks = [f"Mean ± standard deviation on {CHOICE} over all runs with that value, whatever their other settings."]
    if asked_unlike_rows(runs.values(), CHOICE):
        remarks.insert(0, f"These values were not all asked the same rows of {CHOICE}: differences may be the rows'.")
    return Table(f"Effect of {key}", "lrr", [key, "runs", CHOICE], rows, remarks)


def runs_table(settings: Sequence[Setting]) -> Table:
    """Every run that is trained, with what became of it."""
    headers = ["run", "setting", "seed", "state", "steps", "GPU-h", CHOICE, REPORT, "what happened"]
    rows = [_run_row(setting, run) for setting in settings for run in setting.runs]
    return Table("Runs", "llrlrrrrl", headers, rows)


def _run_row(setting: Setting, run: RunRecord) -> list[str]:
    step = f"{run.metrics[-1]['step']:,}" if run.metrics else NONE
    scores = [NONE if (score := own_score(run, split)) is None else f"{score:.3f}" for split in (CHOICE, REPORT)]
    told = "; ".join(filter(None, (happened(run), " ".join(run.standing.reason.split()))))
    known = [run.handle, setting.name, str(run.config.seed), state(run)[0], step, f"{run.usage.hours:.2f}"]
    return [*known, *scores, told]


def cross_table(settings: Sequence[Setting]) -> Table | None:
    """Every setting on every dataset and split that any run was asked on; None if there is only the runs' own."""
    places = list(dict.fromkeys(place for setting in settings for place in _scores(setting)))
    if len({place.dataset for place in places}) < 2:
        return None
    headers = ["setting", *[_header(place, places) for place in places]]
    rows = []
    for setting in settings:
        scores = _scores(setting)
        rows.append([setting.name, *[values_text(scores.get(place, [])) for place in places]])
    remark = f"Main metric after training, {_OVER_SEEDS.split(';')[0]}."
    return Table("Across datasets", "l" + "r" * len(places), headers, rows, [remark])


def _scores(setting: Setting) -> dict[_Place, list[float]]:
    """The main metric after training, of every run that was asked there."""
    found: dict[_Place, list[float]] = {}
    for run in setting.runs:
        for split in run.splits:
            if after := split.after:
                place = _Place(split.dataset, split.split, after.scores["metric"], after.rows)
                found.setdefault(place, []).extend([] if after.value is None else [after.value])
    return found


def _header(place: _Place, places: Sequence[_Place]) -> str:
    """Places of one name are told apart by metric and by the beginning of the rows' fingerprint."""
    name = f"{place.dataset} {place.split}"
    if [(one.dataset, one.split) for one in places].count((place.dataset, place.split)) == 1:
        return name
    return f"{name}, {place.metric} ({place.rows[:8]})"
