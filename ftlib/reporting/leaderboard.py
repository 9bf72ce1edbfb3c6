"""What a sweep found, as tables: settings in their order, the effect of each key, every run, other datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftlib.reporting.collect import BEFORE, RunRecord
from ftlib.reporting.scores import NONE
from ftlib.reporting.seeds import Spread, spread_of
from ftlib.reporting.settings import CHOICE, REPORT, Setting, contests, own_score
from ftlib.reporting.state import happened, state
from ftlib.reporting.tables import Table

_OVER_SEEDS = "mean ± standard deviation over the seeds; interval of that mean by Student's t"


def leaderboards(settings: Sequence[Setting]) -> list[Table]:
    """A table per metric and dataset: settings ranked by valid, with their scores on test beside."""
    boards = [(board[0].metric, board) for board in contests(settings)]
    several = len(boards) > 1
    return [_leaderboard(metric, place_of(board) if several else "", board) for metric, board in boards if metric]


def place_of(settings: Sequence[Setting]) -> str:
    """What the settings of a contest were trained for, by the names of their configs."""
    return ", ".join(dict.fromkeys(run.config.name for setting in settings for run in setting.runs))


def _leaderboard(metric: str, place: str, settings: Sequence[Setting]) -> Table:
    headers = ["setting", "seeds", CHOICE, "95 % interval", REPORT, "95 % interval", f"{CHOICE} before"]
    remark = f"{metric}: {_OVER_SEEDS}. Ranked by {CHOICE}; {REPORT} had no part in it."
    missing = [setting.name for setting in settings if setting.spread(CHOICE) is None]
    unranked = [f"Not ranked, for want of scores on {CHOICE}: {'; '.join(missing)}."] if missing else []
    title = f"Leaderboard, {metric}{place and ' on '}{place}"
    return Table(title, "lrrrrrr", headers, [_row(one) for one in settings], [remark, *unranked])


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


def effects(settings: Sequence[Setting]) -> list[Table]:
    """For each key that varies, what its values come to over everything else; for sweeps of two keys and more."""
    return [table for board in contests(settings) for table in _effects(board)]


def _effects(board: Sequence[Setting]) -> list[Table]:
    keys = [key for key in board[0].values if len({setting.values[key] for setting in board}) > 1]
    return [_effect(key, board) for key in keys] if len(keys) > 1 else []


def _effect(key: str, settings: Sequence[Setting]) -> Table:
    found: dict[str, list[float]] = {}
    for setting in settings:
        scores = [score for run in setting.runs if (score := own_score(run, CHOICE)) is not None]
        found.setdefault(setting.values[key], []).extend(scores)
    rows = [
        [value, str(len(scores)), spread_text(spread_of(scores) if scores else None)] for value, scores in found.items()
    ]
    remark = f"Mean ± standard deviation on {CHOICE} over all runs with that value, whatever their other settings."
    return Table(f"Effect of {key}", "lrr", [key, "runs", CHOICE], rows, [remark])


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
    places = dict.fromkeys(place for setting in settings for place in _places(setting))
    if len({dataset for dataset, _ in places}) < 2:
        return None
    headers = ["setting", *[f"{dataset} {split}" for dataset, split in places]]
    rows = [[setting.name, *[_cross_cell(setting, *place) for place in places]] for setting in settings]
    remark = f"Main metric after training, {_OVER_SEEDS.split(';')[0]}."
    return Table("Across datasets", "l" + "r" * len(places), headers, rows, [remark])


def _places(setting: Setting) -> Iterator[tuple[str, str]]:
    for run in setting.runs:
        yield from ((split.dataset, split.split) for split in run.splits if split.after)


def _cross_cell(setting: Setting, dataset: str, split: str) -> str:
    known = [one for run in setting.runs for one in run.splits if (one.dataset, one.split) == (dataset, split)]
    scores = [float(one.after.scores["value"]) for one in known if one.after]
    return spread_text(spread_of(scores)) if scores else NONE
